"""Convert source audio to the rate, length and channels that a model's encoder needs.

Resampling gives the same samples as torchaudio's default resampler, which the reference implementations use. The
samples of other resamplers differ by up to 0.02, and their length by one sample, which would change the model's output.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from stable_audio_serve.core.errors import InvalidUploadError
from stable_audio_serve.core.generation import SourceAudio

_ZERO_CROSSINGS = 6
_ROLLOFF = 0.99
# Phases (output samples within a period) that are computed by one product. If two sample rates are almost coprime, one
# product for all phases would need a gigabyte of filter weights, mostly zeros.
_TILE_PHASES = 64


def prepare_source(
    audio: SourceAudio,
    *,
    sample_rate_hz: int,
    channels: int,
    num_samples: int,
    start: int = 0,
    is_repeated: bool = False,
) -> Tensor:
    """Return `audio` as (channels, num_samples) float32 on the CPU, resampled to `sample_rate_hz`.

    The audio begins at the sample `start` of the result, and is cropped where the result ends. The samples before and
    after it are zeros, or repetitions of the audio if `is_repeated`.
    """
    # Copy read-only arrays, about which torch would warn. Arrays that come from another process are read-only.
    samples = torch.from_numpy(np.require(audio.samples, np.float32, ["C", "W"]))
    samples = fix_channels(samples, channels)
    room = num_samples - start
    samples = resample(samples, audio.sample_rate_hz, to_hz=sample_rate_hz, max_samples=room)[:, :room]
    if is_repeated:
        return samples[:, (torch.arange(num_samples) - start) % samples.shape[-1]]
    return functional.pad(samples, (start, room - samples.shape[-1]))


def fix_channels(samples: Tensor, channels: int) -> Tensor:
    """Convert samples (C, S) to (channels, S).

    A mono source is copied to all channels. If `channels` is 1, the result is the mean of the source's channels.
    Otherwise the first channels are kept. Raises InvalidUploadError if the source has several channels, but fewer than
    `channels`.
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


def resample(samples: Tensor, from_hz: int, *, to_hz: int, max_samples: int | None = None) -> Tensor:
    """Resample `samples` (C, S) float32 to (C, ceil(S * to_hz / from_hz)), or to the first `max_samples` of that.

    The filter is a sinc with a Hann window, 6 zero crossings and a roll-off of 0.99. Let o and n be `from_hz` and
    `to_hz` divided by their greatest common divisor, and c = 0.99 min(o, n). Output sample j is the sum over all input
    samples x[k] of x[k] (c/o) sinc(t) cos^2(pi t / 12), where t = clamp((k/o - j/n) c, -6, 6).
    """
    divisor = math.gcd(from_hz, to_hz)
    source_step, num_phases = from_hz // divisor, to_hz // divisor
    length = -(-samples.shape[-1] * num_phases // source_step)
    if max_samples is not None and max_samples < length:
        length = max_samples
    if source_step == num_phases:
        return samples[:, :length]
    cutoff = _ROLLOFF * min(source_step, num_phases)
    reach = math.ceil(_ZERO_CROSSINGS * source_step / cutoff)
    periods = -(-length // num_phases)
    needed = periods * source_step + reach
    inside = samples[:, :needed]
    padded = functional.pad(inside, (reach, source_step + needed - inside.shape[-1]))
    output = samples.new_empty(samples.shape[0], periods, num_phases)
    used_phases = min(num_phases, length)
    for first in range(0, used_phases, _TILE_PHASES):
        phases = torch.arange(first, min(first + _TILE_PHASES, used_phases))
        start = first * source_step // num_phases
        stop = int(phases[-1]) * source_step // num_phases + 2 * reach + 1
        kernel = _kernel(
            phases, torch.arange(start, stop) - reach, source_step=source_step, num_phases=num_phases, cutoff=cutoff
        )
        # A convolution would copy the whole signal for each tile, and an unusual rate has hundreds of tiles.
        taken = padded[:, start:].unfold(-1, stop - start, source_step)[:, :periods]
        output[:, :, first : first + len(phases)] = taken @ kernel.T
    return output.flatten(1)[:, :length]


def _kernel(phases: Tensor, taps: Tensor, *, source_step: int, num_phases: int, cutoff: float) -> Tensor:
    """Return the filter weights (phases, taps) float32, computed in float64.

    `phases` are positions of output samples and `taps` positions of input samples, from the start of a period.
    """
    distance = taps.double()[None] / source_step - phases.double()[:, None] / num_phases
    t = (distance * cutoff).clamp(-_ZERO_CROSSINGS, _ZERO_CROSSINGS)
    window = torch.cos(t * math.pi / _ZERO_CROSSINGS / 2) ** 2
    return (torch.sinc(t) * window * (cutoff / source_step)).float()
