"""Stage 1 of training the demo model: trains the autoencoder on oscillator-bank frames of random scenes."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from examples.demo_model.optim import MixedOptimizer
from examples.demo_model.scenes import SHARES, draw_scene
from examples.demo_model.synthesis import render_scene
from stable_audio_serve.models.oscillator.bank import NUM_CHANNELS, NUM_OSCILLATORS
from stable_audio_serve.models.oscillator.parts import PatchMlpDecoder, PatchMlpEncoder

PATCH_FRAMES = 8
LATENT_DIM = 64
LATENT_S = 4096 / 44100

# Relative frequencies of kinds of scenes. Sweeps, arpeggios and beats are frequent, because they are hard to learn.
_SHARES = SHARES | {"sweep": 0.26, "arpeggio": 0.10, "chord": 0.14, "beat": 0.18, "tone": 0.28, "hush": 0.01}


@dataclass(frozen=True, slots=True)
class AutoencoderConfig:
    """The sizes of the autoencoder, and its training schedule."""

    width: int = 384
    encoder_depth: int = 1
    decoder_depth: int = 2
    batch_patches: int = 1024
    pool_patches: int = 40_000
    steps: int = 1600
    noise: float = 0.2
    smoothness: float = 0.4
    seed: int = 0


class Autoencoder(nn.Module):
    """An encoder and a decoder of patches (8 consecutive frames). `standardise` scales the latents after training."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.encoder = PatchMlpEncoder(
            in_channels=NUM_CHANNELS,
            patch_frames=PATCH_FRAMES,
            width=config.width,
            depth=config.encoder_depth,
            latent_dim=LATENT_DIM,
        )
        _smooth_over_pitch(self.encoder.project_in)
        self.decoder = PatchMlpDecoder(
            out_channels=NUM_CHANNELS,
            patch_frames=PATCH_FRAMES,
            width=config.width,
            depth=config.decoder_depth,
            latent_dim=LATENT_DIM,
        )


def _smooth_over_pitch(layer: nn.Linear) -> None:
    """Blur the initial weights of the first layer over the oscillators, so that features change slowly with pitch."""
    with torch.no_grad():
        weight = layer.weight.view(len(layer.weight), PATCH_FRAMES, NUM_CHANNELS)
        tones = weight[:, :, :NUM_OSCILLATORS]
        offsets = torch.arange(-12.0, 13.0)
        kernel = torch.exp(-0.5 * (offsets / 4.0).square())
        kernel = (kernel / kernel.square().sum().sqrt())[None, None]
        blurred = nn.functional.conv1d(tones.flatten(0, 1)[:, None], kernel, padding=12)
        weight[:, :, :NUM_OSCILLATORS] = blurred.view_as(tones)


class PatchPool:
    """A pool of patches (8 frames of 222 values) from random clips. Each draw replaces some of the patches."""

    def __init__(self, size: int, rng: np.random.Generator) -> None:
        self._rng = rng
        self._patches = np.zeros((size, PATCH_FRAMES, NUM_CHANNELS), np.float16)
        self._cursor = 0
        filled = 0
        while filled < size:
            filled += self._add_clip()

    def draw(self, count: int, *, fresh_clips: int = 16) -> Tensor:
        """Add patches of `fresh_clips` new clips to the pool. Returns random patches (count, 222, 8) float32."""
        for _ in range(fresh_clips):
            self._add_clip()
        chosen = self._patches[self._rng.integers(len(self._patches), size=count)]
        return torch.from_numpy(chosen.astype(np.float32)).transpose(1, 2)

    def _add_clip(self) -> int:
        patches = draw_patches(self._rng)
        places = (self._cursor + np.arange(len(patches))) % len(self._patches)
        self._patches[places] = patches
        self._cursor = int(places[-1] + 1) % len(self._patches)
        return len(patches)


def draw_patches(rng: np.random.Generator, *, count: int = 8) -> npt.NDArray[np.float32]:
    """Draw up to `count` patches of one random clip. Its first two patches and its end are drawn more often."""
    if rng.random() < 0.08:
        return _draw_spectra(rng, count)
    duration_s = float(np.exp(rng.uniform(np.log(0.5), np.log(8.0))))
    num_latents = int(np.ceil(duration_s / LATENT_S)) + 1
    scene = draw_scene(rng, shares=_SHARES)
    frames = render_scene(scene, rng, duration_s=duration_s, num_frames=num_latents * PATCH_FRAMES)
    if scene.kind in ("tone", "chord", "noise", "silence", "hush"):
        count = 4
    patches = frames.reshape(num_latents, PATCH_FRAMES, NUM_CHANNELS)
    chosen = rng.integers(num_latents, size=count)
    chosen[0] = 0
    return patches[chosen]


def _draw_spectra(rng: np.random.Generator, count: int) -> npt.NDArray[np.float32]:
    """Draw patches of random partials and coloured noise, so that the autoencoder also learns sounds beyond scenes."""
    frames = np.zeros((count, PATCH_FRAMES, NUM_CHANNELS), np.float32)
    slope = np.linspace(0.0, 1.0, PATCH_FRAMES, dtype=np.float32)
    for patch in frames:
        partials = rng.integers(4, NUM_OSCILLATORS - 20, size=rng.integers(0, 13))
        levels = rng.uniform(0.2, 0.85, (2, len(partials)))
        patch[:, partials] = levels[0] + (levels[1] - levels[0]) * slope[:, None] * rng.integers(0, 2)
        colour = np.interp(np.arange(20), [0, 5, 12, 19], rng.uniform(-0.2, 0.7, 4))
        patch[:, NUM_OSCILLATORS:-2] = np.maximum(colour + 0.05 * rng.standard_normal((PATCH_FRAMES, 20)), 0.0)
        patch[:, -2:] = rng.uniform(-1, 1, 2)
        if rng.random() < 0.3:
            patch[: rng.integers(PATCH_FRAMES), :-2] = 0.0
    return frames


def reconstruction_loss(decoded: Tensor, target: Tensor) -> Tensor:
    """Returns the mean loss over patches: of levels, of levels blurred over the oscillators, and of stereo balances.

    The loss of levels is (5 L1 + 50 L2) / sqrt(mean square + 0.003). Because of the blurred levels, a small error in
    pitch costs less than a large error. Where the target is silent, negative levels cost nothing, because they are
    silent too.
    """
    levels, wanted = decoded[:, :-2], target[:, :-2]
    error = torch.where(wanted > 0, levels - wanted, levels.clamp(min=0.0))
    weight = (wanted.square().mean(dim=(1, 2)) + 0.003).rsqrt()
    per_patch = 5.0 * error.abs().mean(dim=(1, 2)) + 50.0 * error.square().mean(dim=(1, 2))
    tones = error[:, :NUM_OSCILLATORS].transpose(1, 2).flatten(0, 1)[:, None]
    for size in (5, 17):
        blurred = nn.functional.avg_pool1d(tones, size, stride=1, padding=size // 2) * size**0.5
        per_patch = per_patch + 25.0 * blurred.square().reshape(len(target), -1).mean(dim=1)
    sounding = torch.stack([wanted[:, :NUM_OSCILLATORS].amax(1), wanted[:, NUM_OSCILLATORS:].amax(1)], dim=1)
    balance = ((decoded[:, -2:] - target[:, -2:]).square() * (0.1 + sounding)).mean(dim=(1, 2))
    return (per_patch * weight * 0.1 + 0.5 * balance).mean()


class AutoencoderTrainer:
    """Trains the autoencoder, and saves and loads the state of the training."""

    def __init__(self, config: AutoencoderConfig, *, device: str = "cpu") -> None:
        torch.manual_seed(config.seed)
        self.config = config
        self.device = device
        self.model = Autoencoder(config).to(device)
        self.optimizer = MixedOptimizer(self.model.named_parameters(), total_steps=config.steps)
        self.step = 0

    def train_step(self, target: Tensor) -> float:
        """Make one update with the patches `target` (patches, 222, 8). Returns the reconstruction loss."""
        target = target.to(self.device)
        with torch.autocast(self.device, dtype=torch.bfloat16):
            latents = self.model.encoder(target)
            level = self.config.noise * torch.rand(len(target), 1, 1, device=self.device)
            decoded = self.model.decoder(latents + level * torch.randn_like(latents))
        loss = reconstruction_loss(decoded.float(), target)
        mean, variance = latents.float().mean(dim=(0, 2)), latents.float().var(dim=(0, 2))
        spread = (mean.square() + variance - variance.clamp(min=1e-6).log() - 1.0).mean()
        (loss + 0.02 * spread + self.config.smoothness * self._roughness(target, latents)).backward()
        self.optimizer.step(self.step)
        self.step += 1
        return float(loss.detach())

    def _roughness(self, target: Tensor, latents: Tensor) -> Tensor:
        """Returns the mean squared change of the latents when every tone is moved by one oscillator.

        Added to the loss, it makes latents change smoothly with pitch.
        """
        count = len(target) // 3  # a third of the patches is enough, and faster
        moved = target[:count].clone()
        moved[:, :NUM_OSCILLATORS] = moved[:, :NUM_OSCILLATORS].roll(1 if self.step % 2 else -1, dims=1)
        with torch.autocast(self.device, dtype=torch.bfloat16):
            distance = self.model.encoder(moved) - latents[:count]
        return distance.float().square().mean()

    def save(self, path: Path) -> None:
        """Write the state of the training to a file, atomically."""
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step}
        torch.save(state, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    def load(self, path: Path) -> None:
        """Read the state of the training that `save` wrote."""
        state = torch.load(path, weights_only=True, map_location=self.device)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = int(state["step"])


def train_autoencoder(config: AutoencoderConfig, folder: Path, *, device: str = "cpu") -> Autoencoder:
    """Train the autoencoder, or resume from `folder/autoencoder.pt`. The result has standardised latents."""
    trainer = AutoencoderTrainer(config, device=device)
    path = folder / "autoencoder.pt"
    if path.exists():
        trainer.load(path)
    if trainer.step < config.steps:
        _run(trainer, path)
    standardise(trainer.model.cpu(), seed=config.seed)
    return trainer.model


def _run(trainer: AutoencoderTrainer, path: Path) -> None:
    config = trainer.config
    pool = PatchPool(config.pool_patches, np.random.default_rng((config.seed, trainer.step)))
    began, start, total = time.monotonic(), trainer.step, 0.0
    while trainer.step < config.steps:
        total += trainer.train_step(pool.draw(config.batch_patches))
        if trainer.step % 100 == 0:
            speed = (time.monotonic() - began) / (trainer.step - start)
            print(
                f"autoencoder step {trainer.step}/{config.steps} loss {total / 100:.4f} {speed:.3f} s/step", flush=True
            )
            total = 0.0
        if trainer.step % 500 == 0 or trainer.step == config.steps:
            print(f"  {describe(trainer.model, seed=config.seed + 1)}", flush=True)
            trainer.save(path)


def standardise(model: Autoencoder, *, seed: int, num_clips: int = 400) -> None:
    """Scale every latent channel to mean 0 and standard deviation 1 over random clips.

    Changes the weights of the encoder's last layer and, inversely, of the decoder's first layer. Decoded frames stay
    the same.
    """
    rng = np.random.default_rng((seed, 3))
    latents = []
    with torch.no_grad():
        for _ in range(num_clips):
            duration_s = float(np.exp(rng.uniform(np.log(0.5), np.log(8.0))))
            frames = (int(np.ceil(duration_s / LATENT_S)) + 3) * PATCH_FRAMES
            clip = render_scene(draw_scene(rng), rng, duration_s=duration_s, num_frames=frames)
            latents.append(model.encoder(torch.from_numpy(clip.T.copy())[None])[0])
        mean, deviation = torch.cat(latents, dim=1).mean(dim=1), torch.cat(latents, dim=1).std(dim=1)
        out, into = model.encoder.project_out, model.decoder.project_in
        out.weight.div_(deviation[:, None])
        out.bias.sub_(mean).div_(deviation)
        into.bias.add_(into.weight @ mean)
        into.weight.mul_(deviation)


def describe(model: Autoencoder, *, seed: int) -> str:
    """Returns a text with two figures for each kind of scene: the share of frames with the right pitch, and L1 error.

    The pitch of a decoded frame is right if the original frame has the same strongest oscillator or an adjacent one.
    """
    rng = np.random.default_rng(seed)
    device = next(model.parameters()).device
    parts = []
    for kind in ("tone", "chord", "arpeggio", "sweep", "beat", "hit", "noise", "pair"):
        patches = []
        for _ in range(60):
            scene = draw_scene(rng, shares={kind: 1.0})
            clip = render_scene(scene, rng, duration_s=2.0, num_frames=176)
            patches.append(clip.reshape(-1, PATCH_FRAMES, NUM_CHANNELS)[rng.integers(22, size=6)])
        target = torch.from_numpy(np.concatenate(patches)).transpose(1, 2).to(device)
        with torch.no_grad():
            latents = model.encoder(target)
            decoded = model.decoder(latents + 0.1 * torch.randn_like(latents))
        strength, wanted = target[:, :NUM_OSCILLATORS].max(1)
        found = decoded[:, :NUM_OSCILLATORS].argmax(1)
        tonal = strength > 0.3
        hit = ((found - wanted).abs() <= 1)[tonal].float().mean() if bool(tonal.any()) else torch.tensor(1.0)
        error = (decoded[:, :-2].clamp(min=0) - target[:, :-2]).abs().sum(dim=(1, 2)) / (
            target[:, :-2].sum(dim=(1, 2)) + 1.0
        )
        parts.append(f"{kind} {100 * float(hit):.0f}% {float(error.mean()):.2f}")
    return ", ".join(parts)
