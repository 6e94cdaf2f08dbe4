"""Converts audio to frames of the oscillator bank (`bank.py`): spectral peaks become tones, the rest noise in bands.

The conversion keeps pitch, rhythm, level and spectrum, but not the waveform. It has no learned parameters.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from stable_audio_serve.models.oscillator.bank import (
    A4_INDEX,
    BAND_EDGES_HZ,
    FRAME_SAMPLES,
    NUM_BANDS,
    NUM_OSCILLATORS,
    OSCILLATOR_HZ,
    SAMPLE_RATE_HZ,
    compress,
)

_PEAK_OVER_MEDIAN = 3.5
_MEDIAN_BLOCK = 32  # number of spectral bins over which a median is computed
_LONG, _MIDDLE, _SHORT = 4096, 2048, 512
# Peaks below this frequency come from the long window (exact pitch), higher peaks from the middle window (exact time).
_SPLIT_HZ = 1000.0
_REGION_EDGES_HZ = (0.0, 700.0, 4000.0, SAMPLE_RATE_HZ / 2 + 1)
_MAX_SHARPENING = 3.0
_LEAKAGE = 0.02  # share of a tone's level that leaks into the 20 bins on each side, because of the window
_HANN_NOISE_BINS = 1.5  # equivalent noise bandwidth of a Hann window
_QUIETEST_BAND = 3e-4
_FRAMES_AT_ONCE = 256  # the spectra of a whole window of the encoder would take 150 MB


def analyse(audio: Tensor) -> Tensor:
    """Returns the frames (222, ceil(samples / 512)) float32 of stereo audio (2, samples) float32."""
    num_frames = -(-audio.shape[1] // FRAME_SAMPLES)
    audio = F.pad(audio, (0, num_frames * FRAME_SAMPLES - audio.shape[1]))
    long, middle = (
        _blocks(audio, size, num_frames=num_frames).split(_FRAMES_AT_ONCE, dim=1) for size in (_LONG, _MIDDLE)
    )
    gains = _sharpening(audio, num_frames).split(_FRAMES_AT_ONCE)
    return torch.cat([_analyse(*blocks, sharpening=gain) for *blocks, gain in zip(long, middle, gains, strict=True)], 1)


def _analyse(long: Tensor, middle: Tensor, *, sharpening: Tensor) -> Tensor:
    """Returns frames (222, F) of blocks of audio (2, F, samples) and gains (F, frequency regions)."""
    long, middle = _spectrum(long), _spectrum(middle)
    low = _Peaks(long, low_hz=0.0, high_hz=_SPLIT_HZ)
    high = _Peaks(middle, low_hz=_SPLIT_HZ, high_hz=float(OSCILLATOR_HZ[-1]) * 1.01)
    tones = torch.maximum(low.on_oscillators(), high.on_oscillators())  # (frames, oscillators)
    bands, noise_sides = _bands(middle)
    tones = tones * _by_region(sharpening, torch.from_numpy(OSCILLATOR_HZ))
    centres = torch.from_numpy((BAND_EDGES_HZ[:-1] + BAND_EDGES_HZ[1:]) / 2)
    bands = bands * _by_region(sharpening, centres)
    balances = [_balance(low.sides() + high.sides()), _balance(noise_sides)]
    return torch.cat([compress(tones).T, compress(bands).T, torch.stack(balances)]).float()


def _blocks(audio: Tensor, size: int, *, num_frames: int) -> Tensor:
    """Returns the blocks (2 channels, frames, samples) of audio that are centred on the frames, as a view."""
    margin = (size - FRAME_SAMPLES) // 2
    return F.pad(audio, (margin, margin)).unfold(1, size, FRAME_SAMPLES)[:, :num_frames]


def _spectrum(blocks: Tensor) -> Tensor:
    """Returns magnitude spectra (2 channels, frames, bins). A sine of amplitude 1 has a peak of 1."""
    window = torch.hann_window(blocks.shape[2], periodic=True, device=blocks.device)
    return torch.fft.rfft(blocks * window).abs() * (2.0 / window.sum())


class _Peaks:
    """The spectral peaks from `low_hz` to `high_hz`: each peak's frequency, level, and level in each channel."""

    def __init__(self, spectrum: Tensor, *, low_hz: float, high_hz: float) -> None:
        both = spectrum.square().mean(dim=0).sqrt()  # level over both channels, (frames, bins)
        self._spectrum = spectrum
        size = 2 * (spectrum.shape[2] - 1)
        hertz = torch.arange(spectrum.shape[2], device=both.device) * (SAMPLE_RATE_HZ / size)
        before, after = F.pad(both, (1, 0))[:, :-1], F.pad(both, (0, 1))[:, 1:]
        self._is_peak = (both > before) & (both >= after) & (both > _PEAK_OVER_MEDIAN * _local_median(both))
        self._is_peak &= (hertz >= low_hz) & (hertz < high_hz) & (both > 2e-4)
        self._is_peak[:, :2] = False
        left, middle, right = (x.clamp(min=1e-9).log() for x in (before, both, after))
        bend = (left - 2 * middle + right).clamp(max=-1e-9)
        offset = (0.5 * (left - right) / bend).clamp(-0.5, 0.5)
        self._hertz = hertz + offset * (SAMPLE_RATE_HZ / size)
        self._level = (middle - 0.25 * (left - right) * offset).exp()

    def on_oscillators(self) -> Tensor:
        """Returns the amplitude of each oscillator (frames, oscillators). A peak counts for its nearest oscillator; the
        strongest peak of an oscillator sets its amplitude.
        """
        index = (A4_INDEX + 24.0 * (self._hertz.clamp(min=1.0) / 440.0).log2()).round().long()
        inside = self._is_peak & (index >= 0) & (index < NUM_OSCILLATORS)
        out = self._level.new_zeros(len(self._level), NUM_OSCILLATORS)
        return out.scatter_reduce(
            1, index.clamp(0, NUM_OSCILLATORS - 1), torch.where(inside, self._level, 0.0), reduce="amax"
        )

    def sides(self) -> Tensor:
        """Returns the power of all peaks of a frame, by channel: (2, frames)."""
        return (self._spectrum.square() * self._is_peak).sum(dim=2)


def _local_median(spectrum: Tensor) -> Tensor:
    """Returns (frames, bins): for each bin, the median of the block of _MEDIAN_BLOCK bins that contains the bin."""
    num_bins = spectrum.shape[1]
    padded = F.pad(spectrum, (0, -num_bins % _MEDIAN_BLOCK))
    medians = padded.unflatten(1, (-1, _MEDIAN_BLOCK)).median(dim=2).values
    return medians.repeat_interleave(_MEDIAN_BLOCK, dim=1)[:, :num_bins]


def _bands(spectrum: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the RMS (frames, bands) of what is not a tone, and the power of this noise by channel, (2, frames).

    The level of a bin next to a tone is limited to about the local median. Bins whose level can be explained by leakage
    of a tone are ignored.
    """
    both = spectrum.square().mean(dim=0).sqrt()
    median = _local_median(both)
    tonal = both > 2.2 * median
    near_tone = F.max_pool1d(tonal.float()[:, None], 5, stride=1, padding=2)[:, 0] > 0
    level = torch.where(near_tone, torch.minimum(both, 1.1 * median), both)
    peaks = both * (both > _PEAK_OVER_MEDIAN * median)
    leakage = _LEAKAGE * F.max_pool1d(peaks[:, None], 41, stride=1, padding=20)[:, 0]
    power = torch.where(level > leakage, level, 0.0).square()
    size = 2 * (spectrum.shape[2] - 1)
    hertz = torch.arange(spectrum.shape[2], dtype=torch.float64) * (SAMPLE_RATE_HZ / size)
    member = torch.bucketize(hertz, torch.from_numpy(BAND_EDGES_HZ[1:-1]), right=True)
    sums = power.new_zeros(len(power), NUM_BANDS).index_add(1, member.to(power.device), power)
    rms = (sums / (2.0 * _HANN_NOISE_BINS)).sqrt()
    sides = (spectrum.square() * ~tonal).sum(dim=2)
    return torch.where(rms < _QUIETEST_BAND, 0.0, rms), sides


def _sharpening(audio: Tensor, num_frames: int) -> Tensor:
    """Returns a gain (frames, frequency regions): the frame's level divided by the level of a longer window around it.

    Multiplying by the gain moves levels that a long window has spread in time back to the frames of the onsets.
    """
    power = _spectrum(_blocks(audio, _SHORT, num_frames=num_frames)).square().mean(dim=0)
    hertz = torch.arange(power.shape[1]) * (SAMPLE_RATE_HZ / _SHORT)
    regions = torch.bucketize(hertz, torch.tensor(_REGION_EDGES_HZ[1:-1]), right=True)
    level = power.new_zeros(len(power), 3).index_add(1, regions.to(power.device), power)
    kernel = torch.hann_window(9, periodic=False, device=audio.device)[1:-1].square()
    kernel = (kernel / kernel.sum())[None, None]
    around = F.conv1d(F.pad(level.T[:, None], (3, 3)), kernel)[:, 0].T
    gain = (level / around.clamp(min=1e-12)).sqrt().clamp(max=_MAX_SHARPENING)
    return torch.where(level < 1e-9, torch.zeros_like(gain), gain)


def _by_region(gain: Tensor, hertz: Tensor) -> Tensor:
    regions = torch.bucketize(hertz, torch.tensor(_REGION_EDGES_HZ[1:-1], dtype=hertz.dtype), right=True)
    return gain[:, regions.to(gain.device)]


def _balance(sides: Tensor) -> Tensor:
    """Returns the stereo balance (frames,) of the channels' powers (2, frames): -1 is left, 1 is right.

    In silence the balance is 0.
    """
    left, right = sides.sqrt()
    balance = torch.atan2(right, left) * (4.0 / math.pi) - 1.0
    return torch.where(left + right < 1e-4, torch.zeros_like(balance), balance)
