"""Stage 3 of training the demo model: trains the decoder on latents of the denoiser, which differ slightly from the
encoder's latents. Encoder and denoiser are not changed, so that encoded audio still has the same latents.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from examples.demo_model.architecture import PATCH_FRAMES
from examples.demo_model.clips import Batch, ClipConfig, ClipSource, prefetched
from examples.demo_model.optim import MixedOptimizer
from examples.demo_model.train_autoencoder import Autoencoder, reconstruction_loss
from examples.demo_model.train_denoiser import HIGHEST_UNNAMED_T, Network, Trainer, draw_times


@dataclass(frozen=True, slots=True)
class DecoderTrainingConfig:
    """The schedule for training the decoder."""

    steps: int = 600
    clips: ClipConfig = field(default_factory=ClipConfig)
    # Share of clips with latents of the encoder plus noise, so that the decoder still reproduces the source of an edit.
    clean_share: float = 0.3
    noise: float = 0.2
    seed: int = 0


def train_decoder(
    config: DecoderTrainingConfig, trainer: Trainer, *, autoencoder: Autoencoder, device: str = "cpu"
) -> None:
    """Train `autoencoder.decoder` in place, on latents that the trained denoiser predicts from noised latents."""
    network = Network().to(device).eval().requires_grad_(False)
    network.load_state_dict(trainer.average)
    source = ClipSource(autoencoder, config.clips, rng=np.random.default_rng((config.seed, 5)))
    decoder = autoencoder.decoder.to(device).train()
    parameters = list(decoder.named_parameters())
    optimizer = MixedOptimizer(
        parameters, total_steps=config.steps, muon_lr=0.004, adam_lr=6e-4, warmup_steps=20, decay_share=0.9
    )
    torch.manual_seed(config.seed + 5)
    stop = threading.Event()
    batches = prefetched(source, stop)
    began, total = time.monotonic(), 0.0
    for step in range(config.steps):
        batch = next(batches).to(device)
        latents = _denoised(network, batch)
        clean = batch.latents + config.noise * torch.rand(1, device=device) * torch.randn_like(batch.latents)
        latents = torch.where(torch.rand(len(latents), 1, 1, device=device) < config.clean_share, clean, latents)
        with torch.autocast(device, dtype=torch.bfloat16):
            decoded = decoder(latents)
        loss = reconstruction_loss(_patches(decoded.float(), batch.valid), _patches(batch.frames, batch.valid))
        loss.backward()
        optimizer.step(step)
        total += float(loss.detach())
        if (step + 1) % 50 == 0:
            speed = (time.monotonic() - began) / (step + 1)
            print(f"decoder step {step + 1}/{config.steps} loss {total / 50:.4f} {speed:.3f} s/step", flush=True)
            total = 0.0
    stop.set()
    decoder.eval().requires_grad_(False)


@torch.no_grad()
def _denoised(network: Network, batch: Batch) -> Tensor:
    """Returns the clean latents (clips, channels, frames) that the denoiser predicts from noised latents.

    Diffusion times are drawn as for training the denoiser, but none are below 0.25, and more are exactly 1.
    """
    t = draw_times(len(batch.latents)).to(batch.latents.device).clamp(min=0.25)
    t = torch.where(torch.rand_like(t) < 0.35, torch.ones_like(t), t)
    t = torch.where(batch.unnamed, HIGHEST_UNNAMED_T * t, t)
    mix = t[:, None, None]
    noise = torch.randn_like(batch.latents)
    noised = (1 - mix) * batch.latents + mix * noise
    with torch.autocast(noise.device.type, dtype=torch.bfloat16):
        context, duration = network.context(batch.tokens, batch.mask, seconds=batch.seconds)
        conditioning = network.denoiser.condition(context, duration, local=batch.local)
        velocity = network.denoiser(noised, t, conditioning=conditioning, valid=batch.valid).float()
    return noised - mix * velocity


def _patches(frames: Tensor, valid: Tensor) -> Tensor:
    """Cut frames (clips, 222, 8 * latents) into patches (patches, 222, 8), without the patches of padding."""
    patches = frames.unflatten(2, (-1, PATCH_FRAMES)).permute(0, 2, 1, 3)
    return patches[valid]
