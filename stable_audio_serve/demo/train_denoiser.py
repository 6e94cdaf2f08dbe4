"""Stage 2: the denoiser and the text encoder learn, together, to turn captions into latents of the trained autoencoder.

Trains through the served classes, with key masking as the server runs. Knows nothing of the world's insides.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from stable_audio_serve.demo import architecture
from stable_audio_serve.demo.architecture import COND_DIM, FRAME_S, HEADROOM_S, LONGEST_TRAINED_S, PATCH_FRAMES
from stable_audio_serve.demo.captions import caption
from stable_audio_serve.demo.optim import MixedOptimizer
from stable_audio_serve.demo.scenes import SHARES, Scene, draw_scene
from stable_audio_serve.demo.synthesis import render_scene
from stable_audio_serve.demo.train_autoencoder import Autoencoder
from stable_audio_serve.demo.vocabulary import MAX_TOKENS, build_tokenizer
from stable_audio_serve.models.blocks.fourier import ExpoFourier
from stable_audio_serve.models.blocks.oscillator_bank import SAMPLE_RATE_HZ
from stable_audio_serve.models.config_reader import ConfigReader
from stable_audio_serve.models.sa3.config import parse_denoiser
from stable_audio_serve.models.sa3.denoiser import Denoiser
from stable_audio_serve.models.sa3.timeline import timeline_features

HEADROOM_LATENTS = int(HEADROOM_S * SAMPLE_RATE_HZ / architecture.HOP)

# A held tone teaches its pitch in a second, so many batches are brief clips of what has a pitch: more notes an hour.
BRIEF_S = 1.4
_BRIEF_SHARES = {"tone": 0.56, "chord": 0.14, "sweep": 0.21, "noise": 0.03, "hit": 0.03, "hush": 0.015, "silence": 0.015}


@dataclass(frozen=True, slots=True)
class DenoiserTrainingConfig:
    """Schedule of stage 2."""

    steps: int = 8000
    batch_latents: int = 1100
    shortest_s: float = 0.5
    longest_s: float = LONGEST_TRAINED_S
    brief_share: float = 0.42
    ema: float = 0.998
    muon_lr: float = 0.015
    adam_lr: float = 2e-3
    decay_share: float = 0.6
    seed: int = 0


class Network(nn.Module):
    """Everything stage 2 trains: text encoder, learned padding, duration embedding, denoiser."""

    def __init__(self) -> None:
        super().__init__()
        config = architecture.model_config()["model"]["diffusion"]["config"]
        self.text = architecture.build_text_encoder()
        self.padding_embedding = nn.Parameter(0.02 * torch.randn(COND_DIM))
        self.seconds = nn.Sequential(ExpoFourier(256), nn.Linear(256, COND_DIM))
        self.denoiser = Denoiser(parse_denoiser(ConfigReader(config)))
        self._quieten()

    def _quieten(self) -> None:
        """Start close to the identity: residual branches speak softly, the outer convolutions not at all."""
        with torch.no_grad():
            for name, parameter in self.denoiser.named_parameters():
                if name.endswith(("to_out.weight", "ff.ff.2.weight", "to_local_embed.2.weight")):
                    parameter.mul_(0.3)
            self.denoiser.preprocess_conv.weight.zero_()
            self.denoiser.postprocess_conv.weight.zero_()
            self.denoiser.transformer.project_out.weight.mul_(0.3)

    def context(self, tokens: Tensor, mask: Tensor, seconds: Tensor) -> tuple[Tensor, Tensor]:
        """Cross tokens (B, T + 1, C) and global vector (B, C) of token ids (B, T), mask (B, T) and seconds (B,)."""
        encoded = self.text(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
        prompt = torch.where(mask[:, :, None], encoded.float(), self.padding_embedding)
        duration = self.seconds((seconds / LONGEST_TRAINED_S).clamp(0.0, 1.0)).float()
        return torch.cat([prompt, duration[:, None]], dim=1), duration


@dataclass(frozen=True, slots=True)
class Batch:
    """Clips for a step: latents (B, D, F), valid (B, F), tokens and mask (B, T), seconds (B,), local (B, C, F)."""

    latents: Tensor
    valid: Tensor
    tokens: Tensor
    mask: Tensor
    seconds: Tensor
    local: Tensor


class ClipSource:
    """Fresh random clips of similar length, encoded by the frozen autoencoder."""

    def __init__(self, autoencoder: Autoencoder, config: DenoiserTrainingConfig, rng: np.random.Generator) -> None:
        self._autoencoder = autoencoder.eval()
        self._config = config
        self._rng = rng
        self._tokenizer = padded_tokenizer()

    def draw(self) -> Batch:
        """One batch on the CPU, latents standardised by the autoencoder itself."""
        rng, config = self._rng, self._config
        brief = rng.random() < config.brief_share
        if brief:
            longest = float(rng.uniform(config.shortest_s, BRIEF_S))
        else:
            longest = float(np.exp(rng.uniform(np.log(config.shortest_s), np.log(config.longest_s))))
        frames = num_latents(longest) + HEADROOM_LATENTS
        count = int(np.clip(config.batch_latents // (frames + 6), 4, 64))
        seconds = np.maximum(longest * rng.uniform(0.75, 1.0, count), config.shortest_s)
        seconds = np.round(np.append(longest, seconds[1:]), 2)
        scenes = [draw_scene(rng, shares=_BRIEF_SHARES if brief else SHARES) for _ in range(count)]
        edits = rng.random(count) < 0.2
        captions = [
            "" if edit and rng.random() < 0.3 else caption(scene, rng)
            for scene, edit in zip(scenes, edits, strict=True)
        ]
        clips = [
            render_scene(scene, rng, duration_s=float(length), num_frames=frames * PATCH_FRAMES)
            for scene, length in zip(scenes, seconds, strict=True)
        ]
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            latents = self._autoencoder.encoder(torch.from_numpy(np.stack(clips)).transpose(1, 2)).float()
        valid = torch.tensor([[n < num_latents(s) + HEADROOM_LATENTS for n in range(frames)] for s in seconds])
        encoded = self._tokenizer.encode_batch(captions)
        return Batch(
            latents,
            valid,
            torch.tensor([entry.ids for entry in encoded]),
            torch.tensor([entry.attention_mask for entry in encoded]).bool(),
            torch.tensor(seconds, dtype=torch.float32),
            self._local(latents, scenes, seconds, edits),
        )

    def _local(self, latents: Tensor, scenes: list[Scene], seconds: np.ndarray[Any, Any], edits: Any) -> Tensor:
        count, _, frames = latents.shape
        keep = torch.zeros(count, 1, frames)
        for row in np.flatnonzero(edits):
            keep[row, 0] = self._keep_mask(frames, num_latents(float(seconds[row])))
        lines = [
            timeline_features(frames, frame_s=FRAME_S, seconds_total=float(length), tempo_bpm=scene.tempo_bpm)
            for scene, length in zip(scenes, seconds, strict=True)
        ]
        return torch.cat([keep, keep * latents, torch.stack(lines)], dim=1)

    def _keep_mask(self, frames: int, sounding: int) -> Tensor:
        """Which latents an edit keeps: a prefix, a suffix, or all but a hole."""
        keep = torch.zeros(frames)
        first, second = sorted(self._rng.integers(1, max(sounding, 2), size=2))
        kind = self._rng.random()
        if kind < 0.45:
            keep[:first] = 1.0
        elif kind < 0.65:
            keep[second:sounding] = 1.0
        else:
            keep[:sounding] = 1.0
            keep[first : max(second, first + 1)] = 0.0
        return keep


def prefetched(source: ClipSource, stop: threading.Event, *, depth: int = 3) -> Iterator[Batch]:
    """Batches of a source, made a few ahead on a side thread until `stop` is set."""
    batches: queue.Queue[Batch] = queue.Queue(depth)

    def fill() -> None:
        while not stop.is_set():
            batch = source.draw()
            while not stop.is_set():
                try:
                    batches.put(batch, timeout=1.0)
                    break
                except queue.Full:
                    continue

    threading.Thread(target=fill, name="clips", daemon=True).start()
    while True:
        yield batches.get()


def padded_tokenizer() -> Tokenizer:
    """The tokenizer, cutting and padding to the model's prompt length."""
    tokenizer = build_tokenizer()
    tokenizer.enable_truncation(MAX_TOKENS)
    tokenizer.enable_padding(length=MAX_TOKENS, pad_id=0, pad_token="<pad>")
    return tokenizer


def num_latents(seconds: float) -> int:
    """Latents that a clip sounds for."""
    return -(-int(seconds * SAMPLE_RATE_HZ) // architecture.HOP)


def draw_times(count: int) -> Tensor:
    """Training times (B,): half uniform, half along the sampler's own schedule, some exactly 1."""
    uniform = torch.rand(count)
    along = torch.sigmoid(8.2 * torch.rand(count) - 2.0)
    times = torch.where(torch.rand(count) < 0.5, uniform, along)
    return torch.where(torch.rand(count) < 0.06, torch.ones(count), times)


def flow_loss(network: Network, batch: Batch) -> Tensor:
    """Rectified flow on one batch: mean squared error of v = noise - data over the valid latents."""
    context, duration = network.context(batch.tokens, batch.mask, batch.seconds)
    dropped = torch.rand(len(context), 1, 1, device=context.device) < 0.1
    context = context.masked_fill(dropped, 0.0)
    conditioning = network.denoiser.condition(context, duration, batch.local)
    noise = torch.randn_like(batch.latents)
    t = draw_times(len(noise)).to(noise.device)
    mix = t[:, None, None]
    velocity = network.denoiser((1 - mix) * batch.latents + mix * noise, t, conditioning, batch.valid)
    error = (velocity.float() - (noise - batch.latents)).square().mean(dim=1)
    return (error * batch.valid).sum() / batch.valid.sum()


class Trainer:
    """Network, average and optimiser of stage 2 with their checkpoint."""

    def __init__(self, config: DenoiserTrainingConfig, *, device: str = "cpu") -> None:
        torch.manual_seed(config.seed)
        self.config = config
        self.device = device
        self.network = Network().to(device)
        self.average = {name: value.detach().clone() for name, value in self.network.state_dict().items()}
        self.optimizer = MixedOptimizer(
            [(n, p) for n, p in self.network.named_parameters() if p.requires_grad],
            total_steps=config.steps,
            muon_lr=config.muon_lr,
            adam_lr=config.adam_lr,
            adam_only=("embed_tokens", "project_in", "project_out", "memory_tokens", "global", "timestep", "seconds"),
            warmup_steps=100,
            decay_share=config.decay_share,
        )
        self.step = 0

    def train_step(self, batch: Batch) -> float:
        """One update; returns the loss."""
        batch = Batch(*(getattr(batch, name).to(self.device) for name in Batch.__slots__))
        with torch.autocast(self.device, dtype=torch.bfloat16):
            loss = flow_loss(self.network, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step(self.step)
        self.step += 1
        weight = 1.0 - min(self.config.ema, (1.0 + self.step) / (10.0 + self.step))
        with torch.no_grad():
            for name, value in self.network.state_dict().items():
                if value.is_floating_point():
                    self.average[name].lerp_(value, weight)
        return float(loss.detach())

    def save(self, path: Path) -> None:
        """Write everything needed to go on, atomically."""
        state = {
            "network": self.network.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
        }
        torch.save(state, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    def load(self, path: Path) -> None:
        """Continue from `save`."""
        state = torch.load(path, weights_only=True, map_location=self.device)
        self.network.load_state_dict(state["network"])
        self.average = state["average"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = int(state["step"])


def train_denoiser(
    config: DenoiserTrainingConfig, autoencoder: Autoencoder, folder: Path, *, device: str = "cpu"
) -> Trainer:
    """Train, resuming from `folder/denoiser.pt` when it is there."""
    trainer = Trainer(config, device=device)
    path = folder / "denoiser.pt"
    if path.exists():
        trainer.load(path)
    source = ClipSource(autoencoder, config, np.random.default_rng((config.seed, 2, trainer.step)))
    torch.manual_seed(config.seed + 17 * trainer.step)
    stop = threading.Event()
    batches = prefetched(source, stop)
    began, start, total = time.monotonic(), trainer.step, 0.0
    while trainer.step < config.steps:
        total += trainer.train_step(next(batches))
        if trainer.step % 100 == 0:
            speed = (time.monotonic() - began) / (trainer.step - start)
            print(f"denoiser step {trainer.step}/{config.steps} loss {total / 100:.4f} {speed:.3f} s/step", flush=True)
            total = 0.0
        if trainer.step % 250 == 0 or trainer.step == config.steps:
            trainer.save(path)
    stop.set()
    return trainer
