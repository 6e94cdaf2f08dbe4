"""A slow, simple implementation of the oscillator bank, the last stage of the demo model's decoder."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from stable_audio_serve.models.oscillator.bank import (
    BAND_EDGES_HZ,
    FRAME_SAMPLES,
    NUM_BANDS,
    NUM_OSCILLATORS,
    OSCILLATOR_HZ,
    SAMPLE_RATE_HZ,
    expand,
)

_BLOCK, _HOP = 512, 256


def render_plainly(frames: Tensor, noise: Tensor, *, start: int) -> Tensor:
    """Returns the audio (2, 512 * F) of F frames of oscillator levels (222, F), which begin at frame `start` of a clip.

    `noise` (2, 512 * F) has the random samples that are filtered to bands of noise.
    """
    tones, bands = expand(frames[:NUM_OSCILLATORS]), expand(frames[NUM_OSCILLATORS : NUM_OSCILLATORS + NUM_BANDS])
    return _tones(_on_both_sides(tones, frames[-2]), start=start) + _noise(_on_both_sides(bands, frames[-1]), noise)


def _on_both_sides(levels: Tensor, balance: Tensor) -> Tensor:
    """Pan the levels (sources, frames) by each frame's balance. Returns left and right levels (2, frames, sources)."""
    angle = (balance.clamp(-1.0, 1.0) + 1.0) * (math.pi / 4.0)
    sides = torch.stack([angle.cos(), angle.sin()]) * math.sqrt(2.0)
    return sides[:, :, None] * levels.T[None]


def _tones(levels: Tensor, *, start: int) -> Tensor:
    num_frames = levels.shape[1]
    omega = 2.0 * np.pi * OSCILLATOR_HZ / SAMPLE_RATE_HZ
    offsets = 2.0 * np.pi * np.modf(np.arange(NUM_OSCILLATORS) * 0.6180339887498949)[0]
    inside = np.outer(omega, np.arange(FRAME_SAMPLES))
    waves = torch.from_numpy(np.concatenate([np.cos(inside), np.sin(inside)]).astype(np.float32))
    samples = torch.arange(start, start + num_frames, dtype=torch.float64) * FRAME_SAMPLES
    phase = torch.outer(samples, torch.from_numpy(omega)) + torch.from_numpy(offsets)
    phase = torch.remainder(phase, 2.0 * math.pi)
    carrier = torch.cat([phase.sin(), phase.cos()], dim=1).float()
    ramp = torch.arange(1, FRAME_SAMPLES + 1, dtype=torch.float32) / FRAME_SAMPLES
    before = F.pad(levels, (0, 0, 1, 0))[:, :-1]
    change = levels - before
    held, rising, falling = (
        (torch.cat([level, level], dim=2) * carrier) @ waves
        for level in (before, change.clamp(min=0.0), change.clamp(max=0.0))
    )
    audio = held + (4.0 * ramp).clamp(max=1.0) * rising + ramp * falling
    return audio.reshape(2, num_frames * FRAME_SAMPLES)


def _noise(levels: Tensor, noise: Tensor) -> Tensor:
    _, num_frames, num_bands = levels.shape
    between = torch.minimum(F.pad(levels, (0, 0, 1, 0))[:, :-1], levels)
    gain = torch.stack([between, levels], dim=2).reshape(2, 2 * num_frames, num_bands)
    gain = F.pad(gain, (0, 0, 0, 1)) @ _band_gains()
    window = torch.hann_window(_BLOCK, periodic=True).sqrt()
    padded = F.pad(noise, (_HOP, _HOP))
    blocks = padded.unfold(1, _BLOCK, _HOP) * window
    shaped = torch.fft.irfft(torch.fft.rfft(blocks) * gain, n=_BLOCK) * window
    audio = torch.zeros_like(padded)
    for index in range(shaped.shape[1]):
        audio[:, index * _HOP : index * _HOP + _BLOCK] += shaped[:, index]
    return audio[:, _HOP:-_HOP]


def _band_gains() -> Tensor:
    bin_hz = SAMPLE_RATE_HZ / _BLOCK
    bins = np.arange(_BLOCK // 2 + 1) * bin_hz
    low, high = BAND_EDGES_HZ[:-1, None], BAND_EDGES_HZ[1:, None]
    covered = np.minimum(bins + bin_hz / 2.0, high) - np.maximum(bins - bin_hz / 2.0, low)
    share = np.clip(covered / bin_hz, 0.0, 1.0)
    width = share.sum(axis=1, keepdims=True)
    return torch.from_numpy((share * np.sqrt((_BLOCK / 2.0) / width)).astype(np.float32))
