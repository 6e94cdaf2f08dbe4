"""Source audio in the shape a model's encoder takes: float samples, the model's rate, length and channels."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from stable_audio_serve.audio.resample import resample
from stable_audio_serve.core.errors import InvalidUploadError
from stable_audio_serve.core.generation import SourceAudio

# Full scale of the integer formats the references accept (not a power of two: -32768 comes out below -1).
_FULL_SCALE = {np.dtype(np.int16): 32767.0, np.dtype(np.int32): 2147483647.0}


def float_samples(frames: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Samples as read from a file, (S, C) or (S,), as (C, S) float32; integers are divided by their full scale.

    Raises InvalidUploadError for any type but int16, int32 and floats.
    """
    if frames.dtype in _FULL_SCALE:
        scaled = frames.astype(np.float32) / np.float32(_FULL_SCALE[frames.dtype])
    elif np.issubdtype(frames.dtype, np.floating):
        scaled = frames.astype(np.float32)
    else:
        raise InvalidUploadError(f"samples of type {frames.dtype} are not supported")
    return np.ascontiguousarray(np.atleast_2d(scaled.T))


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
