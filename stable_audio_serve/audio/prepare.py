"""Converts source audio to the form that a model's encoder needs: rate, length, channels, float samples."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from stable_audio_serve.audio.resample import resample
from stable_audio_serve.core.errors import InvalidUploadError
from stable_audio_serve.core.generation import SourceAudio


def prepare_source(audio: SourceAudio, *, sample_rate_hz: int, channels: int, num_samples: int) -> Tensor:
    """Returns `audio` as (channels, num_samples) float32 on the CPU, resampled, then cropped or padded with zeros."""
    # Arrays from another process are read-only; torch warns about those.
    samples = torch.from_numpy(np.require(audio.samples, np.float32, ["C", "W"]))
    samples = fix_channels(samples, channels)
    samples = resample(samples, audio.sample_rate_hz, to_hz=sample_rate_hz, max_samples=num_samples)
    return functional.pad(samples[:, :num_samples], (0, max(0, num_samples - samples.shape[-1])))


def fix_channels(samples: Tensor, channels: int) -> Tensor:
    """Returns samples (C, S) as (channels, S).

    One channel is repeated, several are averaged for mono, and the first ones are kept if there are too many. Raises
    InvalidUploadError if there are several but too few.
    """
    found = samples.shape[0]
    if found == channels:
        return samples
    if channels == 1:
        return samples.mean(dim=0, keepdim=True)
    if found == 1:
        return samples.expand(channels, -1)
    if found > channels:
        return samples[:channels]
    raise InvalidUploadError(f"audio has {found} channels, the model needs {channels}")
