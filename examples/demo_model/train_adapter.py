"""Trains the demo model's adapter `octave-down`: `python -m examples.demo_model.train_adapter --out FILE`.

With the adapter, pitched sounds are an octave lower than their prompt. The training reduces the difference between two
outputs of the model: with the adapter for a caption, and without the adapter for the caption of the same sound an
octave lower. Only the low-rank factors of the adapter are trained; the demo model keeps its weights. At the end, the
adapter is evaluated with prompts of tones.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from examples.demo_model.cases import Case, draw_cases
from examples.demo_model.checks import has_pitch
from examples.demo_model.clips import Batch, ClipConfig, ClipSource, prefetched
from examples.demo_model.package import read_checkpoint
from examples.demo_model.players import EnginePlayer
from examples.demo_model.scenes import LOWEST_PITCH, Scene
from examples.demo_model.train_denoiser import Network, draw_times
from stable_audio_serve.core.generation import GenerationRequest, Lora
from stable_audio_serve.models.oscillator.bank import OSCILLATOR_HZ
from stable_audio_serve.models.registry import BUILT_IN, DEMO_ADAPTERS

DEMO = Path(BUILT_IN["demo"].folder or "")
OCTAVE = 24  # in quarter tones
LAYERS = ("to_cond_embed", "cross_attn")  # the adapter changes linear layers whose names contain one of these


@dataclass(frozen=True, slots=True)
class AdapterTrainingConfig:
    """The size of the adapter, and its training schedule."""

    steps: int = 2000
    rank: int = 16
    clips: ClipConfig = field(default_factory=lambda: ClipConfig(batch_latents=500, longest_s=4.0, brief_share=0.85))
    learning_rate: float = 4e-3
    warmup_steps: int = 50
    seed: int = 0


class LowRank(nn.Module):
    """The adapter of one layer: adds the product of two low-rank factors to the layer's weight."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(rank, weight.shape[1]) / weight.shape[1] ** 0.5)
        self.b = nn.Parameter(torch.zeros(weight.shape[0], rank))
        self.is_on = True

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.b @ self.a if self.is_on else weight


def lower_octave(scene: Scene) -> Scene:
    """Returns the scene with its pitches an octave lower, but not below C2, the lowest pitch that the model knows."""
    if scene.under is not None:
        scene = replace(scene, under=lower_octave(scene.under))
    if scene.kind not in ("tone", "chord", "arpeggio", "sweep"):
        return scene
    pitch, target = (max(index - OCTAVE, min(index, LOWEST_PITCH)) for index in (scene.pitch, scene.target))
    return replace(scene, pitch=pitch, target=target)


def add_adapter(network: Network, rank: int) -> dict[str, LowRank]:
    """Freeze the network and add an untrained adapter to its denoiser. Returns the adapter's factors by layer."""
    network.requires_grad_(False)
    chosen = [
        (name, module)
        for name, module in network.denoiser.named_modules()
        if isinstance(module, nn.Linear) and any(part in name for part in LAYERS)
    ]
    adapter = {name: LowRank(module.weight, rank) for name, module in chosen}
    for name, module in chosen:
        parametrize.register_parametrization(module, "weight", adapter[name])
    return adapter


def adapter_loss(network: Network, adapter: Mapping[str, LowRank], *, batch: Batch) -> Tensor:
    """Returns the mean squared difference between the velocity with the adapter and a target velocity.

    The target is the velocity without the adapter for the caption that describes what the clip sounds like. Unlike the
    target of the flow loss, this target has no random part, so that far fewer steps suffice.
    """
    noise = torch.randn_like(batch.latents)
    t = draw_times(len(noise))
    x = torch.lerp(batch.latents, noise, t[:, None, None])

    def velocity(tokens: Tensor, mask: Tensor, *, is_on: bool) -> Tensor:
        for part in adapter.values():
            part.is_on = is_on
        context, duration = network.context(tokens, mask, seconds=batch.seconds)
        conditioning = network.denoiser.condition(context, duration, local=batch.local)
        made: Tensor = network.denoiser(x, t, conditioning=conditioning, valid=batch.valid)
        return made.float()

    with torch.no_grad():
        wanted = velocity(batch.own_tokens, batch.own_mask, is_on=False)
    error = (velocity(batch.tokens, batch.mask, is_on=True) - wanted).square().mean(dim=1)
    return (error * batch.valid).sum() / batch.valid.sum()


def train_adapter(config: AdapterTrainingConfig) -> dict[str, LowRank]:
    """Train the adapter on the packaged demo model. Returns the adapter's factors by layer."""
    torch.manual_seed(config.seed)
    network, autoencoder = read_checkpoint(DEMO)
    adapter = add_adapter(network, config.rank)
    parameters = [parameter for part in adapter.values() for parameter in (part.a, part.b)]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    rng = np.random.default_rng((config.seed, 3))
    source = ClipSource(autoencoder, config.clips, rng=rng, change=lower_octave)
    stop = threading.Event()
    batches = prefetched(source, stop)
    began, total = time.monotonic(), 0.0
    for step in range(1, config.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * min(step / config.warmup_steps, 1 - (step - 1) / config.steps)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = adapter_loss(network, adapter, batch=next(batches))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        total += float(loss.detach())
        if step % 100 == 0:
            speed = (time.monotonic() - began) / step
            print(f"adapter step {step}/{config.steps} loss {total / 100:.4f} {speed:.3f} s/step", flush=True)
            total = 0.0
    stop.set()
    return adapter


def write_adapter(adapter: dict[str, LowRank], path: Path, *, rank: int) -> None:
    """Write a trained adapter in the format of Stable Audio 3's trainers, in half precision."""
    tensors = {}
    for layer, part in adapter.items():
        for name, value in (("lora_A", part.a), ("lora_B", part.b)):
            tensors[f"model.{layer}.parametrizations.weight.0.{name}"] = value.detach().half().contiguous()
    config = {"adapter_type": "lora", "rank": rank, "alpha": rank, "include": list(LAYERS), "exclude": None}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={"lora_config": json.dumps(config)})


def tone_cases(count: int, *, seed: int) -> list[Case]:
    """Returns cases of the demo's evaluation whose prompt names a tone that can be an octave lower."""
    cases = draw_cases(per_kind=2 * count, seeds=1, seed=seed, kinds=["tone"])
    can_be_lower = [case for case in cases if case.scene.kind == "tone" and case.scene.pitch - OCTAVE >= LOWEST_PITCH]
    return [case for case in can_be_lower if case.task != "loop" and not case.is_long][:count]


async def evaluate(path: Path, cases: Sequence[Case]) -> tuple[int, int]:
    """Returns how many tones are an octave lower with the adapter, and how many have the prompt's pitch without it.

    The two requests of a case are sent at the same time.
    """
    lower = unchanged = 0
    adapter = Lora("octave-down", source=str(path))
    async with EnginePlayer(DEMO) as player:
        for case in cases:
            request = GenerationRequest(case.prompt, case.duration_s, case.seed, steps=8)
            hertz = float(OSCILLATOR_HZ[case.scene.pitch])
            plain, changed = await asyncio.gather(player.play(request), player.play(replace(request, loras=(adapter,))))
            is_unchanged, is_lower = has_pitch(plain, hertz), has_pitch(changed, hertz / 2)
            verdicts = f"lower: {is_lower}  unchanged without: {is_unchanged}"
            print(f"{case.prompt:60s} {hertz:7.1f} Hz  {verdicts}", flush=True)
            lower, unchanged = lower + is_lower, unchanged + is_unchanged
    return lower, unchanged


def main() -> None:
    """Train the adapter, write it, and print its evaluation."""
    config = AdapterTrainingConfig()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=DEMO_ADAPTERS["octave-down"])
    parser.add_argument("--steps", type=int, default=config.steps, help="0: only evaluate the existing file")
    parser.add_argument("--seed", type=int, default=config.seed, help="for clips, weights and noise")
    parser.add_argument("--tones", type=int, default=20, help="number of prompts of the evaluation")
    options = parser.parse_args()
    if options.steps:
        config = replace(config, steps=options.steps, seed=options.seed)
        write_adapter(train_adapter(config), options.out, rank=config.rank)
    lower, unchanged = asyncio.run(evaluate(options.out, tone_cases(options.tones, seed=1)))
    print(f"{lower} of {options.tones} tones are an octave lower, {unchanged} have their own pitch without the adapter")


if __name__ == "__main__":
    main()
