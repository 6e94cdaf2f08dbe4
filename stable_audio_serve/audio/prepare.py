"""Source audio in the shape a model's encoder takes: float samples, the model's rate, length and channels."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from stable_audio_serve.audio.resample import resample
from stable_audio_serve.core.errors import InvalidUploadError
from stable_audio_serve.core.generation import SourceAudio


def prepare_source(audio: SourceAudio, *, sample_rate_hz: int, channels: int, num_samples: int) -> Tensor:
    """`audio` as (channels, num_samples) float32 on the CPU: resampled, then cropped or zero-padded at its end."""
    # Arrays from another process are read-only, which torch warns of.
    samples = torch.from_numpy(np.require(audio.samples, np.float32, ["C", "W"]))
    samples = fix_channels(samples, channels)
    samples = resample(samples, audio.sample_rate_hz, to_hz=sample_rate_hz, max_samples=num_samples)
    return functional.pad(samples[:, :num_samples], (0, max(0, num_samples - samples.shape[-1])))


def fix_channels(samples: Tensor, channels: int) -> Tensor:
    """(C, S) as (channels, S): one channel is repeated, of too many the first are kept, for mono they are averaged.

    Raises InvalidUploadError where several channels are still too few.
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
