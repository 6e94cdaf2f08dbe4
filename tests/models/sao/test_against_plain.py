"""Whole runs equal those of a slow, simple implementation, for sizes that have no stored reference values."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from stable_audio_serve.core.generation import GenerationRequest, SourceAudio
from stable_audio_serve.engine import Engine, EngineOptions
from stable_audio_serve.models.config_reader import ConfigReader
from stable_audio_serve.models.families import load_model
from stable_audio_serve.models.native import checkpoint_modules
from stable_audio_serve.models.registry import resolve_entry
from stable_audio_serve.models.sao.build import build_components
from stable_audio_serve.models.sao.config import parse_config
from stable_audio_serve.models.sao.model import SaoModel
from stable_audio_serve.sampling.noise import SeededNoise
from tests.goldens import load_open_goldens
from tests.models.loaded import assert_near
from tests.models.sao.plain_model import PlainModel
from tests.models.sao.test_model import loaded

PROMPT, NEGATIVE = "house music 124 bpm with rain and a piano", "low quality"
LEVEL, SCALE, STEPS = 0.6, 3.0, 4

SIZES: dict[str, dict[str, Any]] = {
    # Mono, projected text, the start before the total, a scale of the latents, a limited range of audio.
    "mono": {
        "objective": "v", "channels": 1, "latents": 3, "strides": [2, 6], "c_mults": [3, 1], "scale": 1.3,
        "decoder": {"final_tanh": True}, "width": 128, "text": 24, "partial": 5,
        "context": ["seconds_start", "prompt", "seconds_total"], "global": ["seconds_total", "seconds_start"],
        "network": {
            "embed_dim": 96, "num_heads": 3, "depth": 2, "ff_kwargs": {"mult": 1.5}, "timestep_features_dim": 64,
        },
    },
    # Three query heads for one head of keys and values, normalised. The seconds are no context.
    "shared": {
        "objective": "rectified_flow", "channels": 2, "latents": 6, "strides": [8], "c_mults": [2], "scale": 1.0,
        "decoder": {"final_tanh": False}, "width": 64, "text": 8, "partial": 0,
        "context": ["prompt"], "global": ["seconds_total"],
        "network": {
            "embed_dim": 192, "num_heads": 3, "depth": 1, "project_cond_tokens": False,
            "attn_kwargs": {"qk_norm": "ln"},
        },
    },
}  # fmt: skip


def make_config(sizes: dict[str, Any]) -> dict[str, Any]:
    config = json.loads((load_open_goldens("tiny-small").folder / "model_config.json").read_text())
    model, latents, channels, hop = config["model"], sizes["latents"], sizes["channels"], math.prod(sizes["strides"])
    config.update(sample_rate=1000, sample_size=30 * hop + sizes["partial"], audio_channels=channels)
    shape = {"strides": sizes["strides"], "c_mults": sizes["c_mults"], "channels": 6}
    autoencoder = model["pretransform"]["config"]
    autoencoder["encoder"]["config"].update(shape, in_channels=channels, latent_dim=2 * latents)
    autoencoder["decoder"]["config"].update(shape, out_channels=channels, latent_dim=latents, **sizes["decoder"])
    autoencoder.update(latent_dim=latents, downsampling_ratio=hop, io_channels=channels)
    model["pretransform"]["scale"] = sizes["scale"]
    model["io_channels"] = latents
    text = {"id": "prompt", "type": "t5", "config": {"t5_model_name": "t5-base", "max_length": sizes["text"]}}
    ranges = {"seconds_start": (-1, 4), "seconds_total": (0, 2)}
    model["conditioning"] = {"cond_dim": sizes["width"], "configs": [text]}
    model["conditioning"]["configs"] += [
        {"id": id_, "type": "number", "config": dict(zip(("min_val", "max_val"), ranges[id_], strict=True))}
        for id_ in sizes["global"]
    ]
    network = {"io_channels": latents, "cond_token_dim": sizes["width"]} | sizes["network"]
    model["diffusion"] = {
        "type": "dit",
        "diffusion_objective": sizes["objective"],
        "cross_attention_cond_ids": sizes["context"],
        "global_cond_ids": sizes["global"],
        "config": network | {"global_cond_dim": sizes["width"] * len(sizes["global"])},
    }
    return config


def make_checkpoint(config: dict[str, Any], folder: Path) -> dict[str, Tensor]:
    """Write a checkpoint with random weights, and return the weights."""
    parsed = parse_config(ConfigReader(config))
    torch.manual_seed(1)
    weights = {}
    for prefix, module in checkpoint_modules(build_components(parsed, loaded("tiny-small").text), parsed).items():
        for key, value in module.state_dict().items():
            weights[prefix + key] = value if "inv_freq" in key else value + 0.1 * torch.randn_like(value)
    last = f"pretransform.model.decoder.layers.{len(parsed.autoencoder.strides) + 2}.weight_g"
    weights[last] = 0.05 * weights[last]  # quiet enough that tanh hides no differences
    shutil.copytree(load_open_goldens("tiny-small").folder / "t5", folder / "t5")
    (folder / "model_config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")
    return weights


class Quiet(SeededNoise):
    """Latent noise as usual, but no noise inside the autoencoder."""

    def window(
        self, stage: str, start: int, *, shape: tuple[int, ...], frame_axis: int, device: torch.device
    ) -> Tensor:
        return torch.zeros(shape)


def flow_run(predict: Callable[[Tensor, float], Tensor], noise: Tensor, source: Tensor) -> Tensor:
    """Returns the result of Euler's method from noise level LEVEL of the source."""
    start = math.log((1 - LEVEL) / LEVEL + 1e-6)
    times = [1 / (1 + math.exp(start + (2 - start) * step / STEPS)) for step in range(STEPS)] + [0.0]
    times[0] = LEVEL
    x = (1 - LEVEL) * source + LEVEL * noise
    for now, then in itertools.pairwise(times):
        x = x + (then - now) * predict(x, now)
    return x


def v_run(predict: Callable[[Tensor, float], Tensor], noise: Tensor, source: Tensor) -> Tensor:
    """Returns the result of DPM-Solver++(2M) from sigma LEVEL, where the noise is added to the source."""
    low = math.log(LEVEL / 2)  # the package's lowest sigma of an edit
    sigmas = [math.exp(math.log(LEVEL) + (low - math.log(LEVEL)) * step / (STEPS - 1)) for step in range(STEPS)]
    x, before = source + LEVEL * noise, None
    h = (math.log(LEVEL) - low) / (STEPS - 1)  # the same for all steps
    for now, then in zip(sigmas, [*sigmas[1:], 0.0], strict=True):
        c = math.hypot(now, 1)
        clean = x / c**2 - predict(x / c, 2 / math.pi * math.atan(now)) * now / c
        if then == 0:
            return clean
        x = then / now * x + (1 - math.exp(-h)) * (clean if before is None else 1.5 * clean - 0.5 * before)
        before = clean
    raise AssertionError("unreachable: the last sigma is 0")


def plain_audio(plain: PlainModel, model: SaoModel, request: GenerationRequest) -> Tensor:
    """Returns the audio (channels, samples) of an edit with guidance, for a source at the model's rate."""
    tokens = model.text.tokenize([PROMPT, NEGATIVE]).ids_and_mask
    hidden, mask = model.text.encode(*tokens.unbind(1)).double(), tokens[:, 1].double()
    seconds = {"seconds_start": 0.0, "seconds_total": request.duration_s}
    contexts = [plain.context(prompt, seconds) for prompt in zip(hidden, mask, strict=True)]
    global_vector = plain.global_vector(seconds)

    def predict(x: Tensor, t: float) -> Tensor:
        wanted, other = (plain.denoise(x, t, context=context, global_vector=global_vector) for context in contexts)
        return other + (wanted - other) * SCALE

    assert request.init_audio is not None
    samples = torch.from_numpy(request.init_audio.samples).double()[:, : plain.config["sample_size"]]
    source = plain.encode(F.pad(samples, (0, plain.config["sample_size"] - samples.shape[1])))[
        :, : model.spec.max_frames
    ]
    noise = SeededNoise(request.seed).initial(tuple(source.shape)).double()
    run = v_run if plain.diffusion["diffusion_objective"] == "v" else flow_run
    return plain.decode(run(predict, noise, source))[:, : int(request.duration_s * plain.config["sample_rate"])]


@pytest.mark.parametrize("source_share", [0.4, 1.3])
@pytest.mark.parametrize("name", SIZES)
def test_runs_match_the_plain_implementation(tmp_path: Path, name: str, source_share: float) -> None:
    config = make_config(SIZES[name])
    weights = make_checkpoint(config, tmp_path)
    model = load_model(resolve_entry(name, path=str(tmp_path)))
    assert isinstance(model, SaoModel)
    shape = (config["audio_channels"], int(source_share * config["sample_size"]))
    clip = SourceAudio(np.random.default_rng(2).uniform(-0.5, 0.5, shape).astype(np.float32), config["sample_rate"])
    request = GenerationRequest(
        prompt=PROMPT, negative_prompt=NEGATIVE, duration_s=0.9 * model.spec.card.max_duration_s, seed=3, steps=STEPS,
        cfg_scale=SCALE, init_audio=clip, init_noise_level=LEVEL,
        sampler="dpmpp-2m" if SIZES[name]["objective"] == "v" else "euler",
        edit_schedule=None if SIZES[name]["objective"] == "v" else "reference",
    )  # fmt: skip

    async def generate() -> np.ndarray:
        async with Engine(model, EngineOptions(warmup_budget_s=0.0, torch_threads=1), noise_factory=Quiet) as engine:
            return (await engine.generate(request)).audio[0]

    audio = torch.from_numpy(asyncio.run(generate())).double()
    with torch.inference_mode():
        plain = PlainModel(config, {key: value.double() for key, value in weights.items()})
        expected = plain_audio(plain, model, request)
    assert expected.abs().max() > 0.02
    assert_near(audio, expected, within=float(1e-4 * expected.abs().max()))
