"""Make frames of oscillator levels by hand, and render them with the oscillator bank of the demo model."""

from __future__ import annotations

import torch

from stable_audio_serve.models.oscillator.bank import (
    FRAME_SAMPLES,
    NUM_CHANNELS,
    NUM_OSCILLATORS,
    OscillatorBank,
    compress,
)


def make_frames(num_frames: int, *, tones: dict[int, float] | None = None, bands: float = 0.0) -> torch.Tensor:
    frames = torch.zeros(NUM_CHANNELS, num_frames)
    for index, amplitude in (tones or {}).items():
        frames[index] = compress(torch.tensor(amplitude))
    frames[NUM_OSCILLATORS:-2] = compress(torch.tensor(bands))
    return frames


def render(frames: torch.Tensor, *, start: int = 0, noise: torch.Tensor | None = None) -> torch.Tensor:
    raw = torch.zeros(2, frames.shape[1] * FRAME_SAMPLES) if noise is None else noise
    return OscillatorBank().render(frames, raw, start_frame=start)
