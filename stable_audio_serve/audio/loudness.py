"""Measure a finished clip: its peak, its integrated loudness, and whether it is silent.

This module computes the loudness without a library, because every client waits for the result. Libraries filter samples
one by one, which takes longer than all other work on a WAV file. The tests compare the result with pyloudnorm.
"""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from stable_audio_serve.audio.peaks import find_peak
from stable_audio_serve.core.sound import ClipFacts

if TYPE_CHECKING:
    import numpy.typing as npt

    _Section = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]

_SILENCE = 10 ** (-70 / 20)  # -70 dBFS; a clip with a lower peak counts as silent
_LEAST_RATE_HZ = 8000  # the filters of ITU-R BS.1770 are not valid at lower rates
_STEP_S = 0.1
_STEPS_PER_BLOCK = 4  # blocks of 0.4 s; the loudness of a shorter clip is undefined
_OFFSET_LUFS = -0.691
_ABSOLUTE_GATE_LUFS = -70.0
_RELATIVE_GATE = 10 ** (-10 / 10)  # blocks more than 10 LU below the mean do not count
_NEGLIGIBLE = 1e-9
_METER_S = 5.0  # length of the audio that a `ClipMeter` measures at once
_SETTLE_S = 0.5  # after this time, audio no longer influences the filter: less than 1e-6 of its level is left
# Sizes chosen by measuring: half or twice each size is slower. Larger matrix products would start BLAS threads, which
# wait for each other on a busy machine. A chunk fits the cache.
_FRAME = 32  # samples filtered by one row of a matrix product
_GROUP = 128  # rows of one matrix product
_CHUNK = 16 * _GROUP * _FRAME  # samples that are filtered together


def describe_clip(audio: npt.NDArray[np.float32], sample_rate_hz: int, *, seed: int) -> ClipFacts:
    """Measure a finished clip, `audio` (C, S) float32 in -1..1."""
    peak = find_peak(audio)
    is_silent = peak < _SILENCE
    loudness = None if is_silent else measure_loudness(audio, sample_rate_hz)
    return ClipFacts(seed=seed, peak=peak, loudness_lufs=loudness, is_silent=is_silent)


def measure_loudness(audio: npt.NDArray[np.float32], sample_rate_hz: int) -> float | None:
    """Return the integrated loudness (ITU-R BS.1770-4) of mono or stereo `audio` (C, S) in LUFS, None if undefined."""
    if sample_rate_hz < _LEAST_RATE_HZ or audio.shape[1] < _STEP_S * _STEPS_PER_BLOCK * sample_rate_hz:
        return None
    with np.errstate(over="ignore", invalid="ignore"):  # squares of infinite or very large samples overflow
        weighted = _apply(_make_k_weighting(sample_rate_hz), audio)
        steps = _step_powers(weighted, round(_STEP_S * sample_rate_hz))
    return _integrate(steps)


def _integrate(steps: npt.NDArray[np.float64]) -> float | None:
    """Return the gated loudness in LUFS, None if undefined. `steps` are the results of `_step_powers`."""
    if len(steps) < _STEPS_PER_BLOCK:
        return None
    powers = np.convolve(steps, np.full(_STEPS_PER_BLOCK, 1 / _STEPS_PER_BLOCK), mode="valid")
    powers = powers[(powers > 10 ** ((_ABSOLUTE_GATE_LUFS - _OFFSET_LUFS) / 10)) & np.isfinite(powers)]
    if not powers.size:
        return None
    return _OFFSET_LUFS + 10 * math.log10(powers[powers > powers.mean() * _RELATIVE_GATE].mean())


class ClipMeter:
    """Makes the measurements of `describe_clip` for a clip that arrives in blocks."""

    def __init__(self, sample_rate_hz: int) -> None:
        self._rate_hz = sample_rate_hz
        self._step = round(_STEP_S * sample_rate_hz)
        self._peak = 0.0
        self._steps: list[npt.NDArray[np.float64]] = []
        self._before: npt.NDArray[np.float32] | None = None  # measured samples that still influence the filter
        self._waiting: list[npt.NDArray[np.float32]] = []

    def add(self, block: npt.NDArray[np.float32]) -> None:
        """Measure the next samples (C, S) float32."""
        self._peak = max(self._peak, find_peak(block))
        self._waiting.append(block)
        if sum(each.shape[1] for each in self._waiting) >= _METER_S * self._rate_hz:
            self._measure(is_last=False)

    def describe(self, *, seed: int) -> ClipFacts:
        """Return the measurements of the clip. Call this once, after the last block."""
        is_silent = self._peak < _SILENCE
        loudness = None
        if self._rate_hz >= _LEAST_RATE_HZ and not is_silent:
            self._measure(is_last=True)
            loudness = _integrate(np.concatenate(self._steps))
        return ClipFacts(seed=seed, peak=self._peak, loudness_lufs=loudness, is_silent=is_silent)

    def _measure(self, *, is_last: bool) -> None:
        new = np.concatenate(self._waiting, axis=1)
        whole = new.shape[1] if is_last else new.shape[1] - new.shape[1] % self._step
        self._waiting = [new[:, whole:]]
        before = np.empty((len(new), 0), np.float32) if self._before is None else self._before
        audio = np.concatenate([before, new[:, :whole]], axis=1)
        with np.errstate(over="ignore", invalid="ignore"):
            weighted = _apply(_make_k_weighting(self._rate_hz), audio)
            self._steps.append(_step_powers(weighted[:, before.shape[1] :], self._step))
        self._before = audio[:, -round(_SETTLE_S * self._rate_hz) :].copy()


def _step_powers(weighted: npt.NDArray[np.float32], step: int) -> npt.NDArray[np.float64]:
    """Return the mean square of each `step` samples of `weighted` (C, S), summed over channels.

    As in pyloudnorm, an incomplete last step is padded with silence if it is more than half full, else dropped.
    """
    num_steps, rest = divmod(weighted.shape[1], step)
    whole, last = weighted[:, : num_steps * step], weighted[:, num_steps * step :]
    steps = whole.reshape(len(weighted), num_steps, step)
    energies = np.vecdot(steps, steps).sum(axis=0, dtype=np.float64)
    if 2 * rest > step:
        energies = np.append(energies, np.vecdot(last, last).sum())
    return energies / step


class _FrameFilter(NamedTuple):
    """A linear filter that processes frames of `_FRAME` samples, with a state of N numbers between frames.

    `response` (_FRAME + N, _FRAME) float32 maps a frame, followed by the state before the frame, to the filtered frame.
    `update` (_FRAME, N) float32 maps a frame to what the frame adds to the state. `decays` are matrices (N, N) float64:
    they map a state to what is left of the state after 1, 2, 4, ... frames, until the rest is negligible.
    """

    response: npt.NDArray[np.float32]
    update: npt.NDArray[np.float32]
    decays: tuple[npt.NDArray[np.float64], ...]


def _apply(frame_filter: _FrameFilter, audio: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return `audio` (C, S) filtered, with silence before its first sample."""
    channels, num_samples = audio.shape
    filtered = np.empty_like(audio)
    frames = np.empty((channels, _CHUNK // _FRAME, len(frame_filter.response)), np.float32)
    groups = frames.reshape(channels, -1, _GROUP, len(frame_filter.response))
    states = np.zeros((channels, frames.shape[1] + 1, len(frame_filter.decays[0])))  # before each frame, and the last
    for start in range(0, num_samples, _CHUNK):
        chunk = audio[:, start : start + _CHUNK]
        length = chunk.shape[1]
        if length < _CHUNK:
            chunk = np.pad(chunk, ((0, 0), (0, _CHUNK - length)))
        frames[:, :, :_FRAME] = chunk.reshape(channels, -1, _FRAME)
        states[:, 0] = states[:, -1]
        states[:, 1:] = (groups[..., :_FRAME] @ frame_filter.update).reshape(channels, -1, states.shape[2])
        # Each pass doubles the number of previous frames that are included in a state.
        for doubling, decay in enumerate(frame_filter.decays):
            distance = 2**doubling
            states[:, distance:] += states[:, :-distance] @ decay
        frames[:, :, _FRAME:] = states[:, :-1]
        filtered[:, start : start + length] = (groups @ frame_filter.response).reshape(channels, -1)[:, :length]
    return filtered


@cache
def _make_k_weighting(sample_rate_hz: int) -> _FrameFilter:
    """Return the high shelf and the high pass of ITU-R BS.1770 (K-weighting) as one filter.

    The matrices of the filter are computed by filtering unit samples and unit states sample by sample.
    """
    signals = np.eye(_FRAME + 4, _FRAME)
    states = np.eye(_FRAME + 4, 4, k=-_FRAME)
    for section, (b, a) in enumerate(_k_weighting_sections(sample_rate_hz)):
        first, second = states[:, 2 * section], states[:, 2 * section + 1]
        for x in signals.T:
            y = b[0] * x + first
            first[:], second[:], x[:] = b[1] * x - a[1] * y + second, b[2] * x - a[2] * y, y
    update, decay = states[:_FRAME], states[_FRAME:]
    decays = [decay]
    while np.abs(decays[-1]).max() > _NEGLIGIBLE:
        decays.append(decays[-1] @ decays[-1])
    return _FrameFilter(signals.astype(np.float32), update.astype(np.float32), tuple(decays))


def _k_weighting_sections(sample_rate_hz: int) -> tuple[_Section, _Section]:
    """Return the coefficients (b, a) of the high shelf and of the high pass at any sample rate.

    The formulas are from De Man, "Evaluation of implementations of the EBU R128 loudness measurement" (AES 145). At
    48 kHz they give the coefficients in the standard.
    """
    k, q = math.tan(math.pi * 1681.974450955533 / sample_rate_hz), 0.7071752369554196
    high = 10 ** (3.999843853973347 / 20)
    band = high**0.4996667741545416
    a = np.array([1 + k / q + k * k, 2 * (k * k - 1), 1 - k / q + k * k])
    b = np.array([high + band * k / q + k * k, 2 * (k * k - high), high - band * k / q + k * k])
    shelf = (b / a[0], a / a[0])
    k, q = math.tan(math.pi * 38.13547087602444 / sample_rate_hz), 0.5003270373238773
    a = np.array([1 + k / q + k * k, 2 * (k * k - 1), 1 - k / q + k * k])
    return shelf, (np.array([1.0, -2.0, 1.0]), a / a[0])
