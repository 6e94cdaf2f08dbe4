"""A synthesizer without weights: renders frames of oscillator levels and noise levels as stereo audio.

The demo model's autoencoder uses it in place of the pretransform `patched` of other checkpoints. Decoding adds sines of
fixed phase and filtered noise. Encoding (`analysis.py`) picks spectral peaks. Audio that is encoded and decoded
therefore sounds vocoded.

A frame describes 512 samples. It has the levels of `NUM_OSCILLATORS` quarter-tone oscillators from 41.2 Hz (440 Hz is
index 82), the levels of `NUM_BANDS` noise bands, and the balances of tones and of noise, -1 (left) ... 1 (right).
Levels are compressed as log(1 + a / 0.001) / log(1001): 0 is silence, 1 an amplitude of 1.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

FRAME_SAMPLES = 512
SAMPLE_RATE_HZ = 44100
NUM_OSCILLATORS = 200
NUM_BANDS = 20
NUM_CHANNELS = NUM_OSCILLATORS + NUM_BANDS + 2
A4_INDEX = 82
FLOOR = 0.001

OSCILLATOR_HZ = 440.0 * 2.0 ** ((np.arange(NUM_OSCILLATORS) - A4_INDEX) / 24.0)
BAND_EDGES_HZ = np.concatenate([[0.0], np.geomspace(150.0, 18000.0, NUM_BANDS - 1), [SAMPLE_RATE_HZ / 2]])

_NOISE_BLOCK = 512
_NOISE_HOP = 256


def compress(amplitude: Tensor) -> Tensor:
    """Returns the level of a linear amplitude, 0 for silence and 1 for an amplitude of 1."""
    return torch.log1p(amplitude / FLOOR) / math.log1p(1.0 / FLOOR)


def expand(level: Tensor) -> Tensor:
    """Returns the linear amplitude of a level (the inverse of `compress`). Negative levels give 0."""
    return FLOOR * torch.expm1(level.clamp(0.0, 1.2) * math.log1p(1.0 / FLOOR))


class OscillatorBank:
    """Renders frames as audio.

    A window of a clip gives the same audio as the whole clip, except within `halo_frames` of an edge of the window.
    """

    halo_frames = 1  # levels fade from the previous frame's, and noise blocks overlap the frames on both sides

    def __init__(self, device: torch.device | str = "cpu") -> None:
        device = torch.device(device)
        omega = 2.0 * np.pi * OSCILLATOR_HZ / SAMPLE_RATE_HZ
        inside = np.outer(omega, np.arange(FRAME_SAMPLES))
        waves = np.concatenate([np.cos(inside), np.sin(inside)])
        self._omega = torch.from_numpy(omega)
        self._phase = torch.from_numpy(2.0 * np.pi * np.modf(np.arange(NUM_OSCILLATORS) * 0.6180339887498949)[0])
        self._waves = torch.from_numpy(waves.astype(np.float32)).to(device)  # (2 * oscillators, samples)
        ramp = torch.arange(1, FRAME_SAMPLES + 1, dtype=torch.float32, device=device) / FRAME_SAMPLES
        self._rise = (4.0 * ramp).clamp(max=1.0)  # rising levels take a quarter of a frame (3 ms): onsets stay sharp
        self._fall = ramp
        self._window = torch.hann_window(_NOISE_BLOCK, periodic=True, device=device).sqrt()
        self._band_gain = _band_gains().to(device)  # (bands, bins)

    def render(self, frames: Tensor, noise: Tensor, *, start_frame: int) -> Tensor:
        """Returns audio (2, 512 F) float32 of F frames (222, F) float32.

        `start_frame` is the position of the first frame in the clip. `noise` (2, 512 F) is standard normal, float32. It
        is filtered to produce the noise bands.
        """
        tonal = expand(frames[:NUM_OSCILLATORS])
        bands = expand(frames[NUM_OSCILLATORS : NUM_OSCILLATORS + NUM_BANDS])
        tonal_pan, noise_pan = (_pan_gains(balance) for balance in frames[-2:])
        return self._tones(tonal, tonal_pan, start_frame=start_frame) + self._noise(bands, noise_pan, noise=noise)

    def _tones(self, amplitude: Tensor, pan: Tensor, *, start_frame: int) -> Tensor:
        num_frames = amplitude.shape[1]
        amplitude, omega, offset, waves = self._sounding(amplitude)
        at = torch.arange(start_frame, start_frame + num_frames, dtype=torch.float64)
        phase = torch.remainder(torch.outer(at * FRAME_SAMPLES, omega) + offset, 2.0 * math.pi)
        carrier = torch.cat([phase.sin(), phase.cos()], dim=1).to(waves)  # (frames, 2 * oscillators)
        stereo = pan[:, :, None] * amplitude.T[None]  # (2 channels, frames, oscillators)
        before = torch.nn.functional.pad(stereo, (0, 0, 1, 0))[:, :-1]
        change = stereo - before
        audio = _sum_waves(before, carrier, waves=waves)
        audio += self._rise * _sum_waves(change.clamp(min=0.0), carrier, waves=waves)
        audio += self._fall * _sum_waves(change.clamp(max=0.0), carrier, waves=waves)
        return audio.reshape(2, num_frames * FRAME_SAMPLES)

    def _sounding(self, amplitude: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns amplitude, frequency, phase and waves of the oscillators that sound in at least one frame.

        Silent oscillators would add exact zeros, so leaving them out changes only the order of summation. On a GPU this
        returns all oscillators: to find the silent ones, the host would have to wait for the device.
        """
        if amplitude.device.type != "cpu":
            return amplitude, self._omega, self._phase, self._waves
        kept = amplitude.any(dim=1).nonzero()[:, 0]
        waves = self._waves[torch.cat([kept, kept + NUM_OSCILLATORS])]
        return amplitude[kept], self._omega[kept], self._phase[kept], waves

    def _noise(self, bands: Tensor, pan: Tensor, *, noise: Tensor) -> Tensor:
        num_frames = bands.shape[1]
        stereo = pan[:, :, None] * bands.T[None]  # (2 channels, frames, bands)
        before = torch.nn.functional.pad(stereo, (0, 0, 1, 0))[:, :-1]
        between = torch.minimum(before, stereo)  # level of a block across two frames: an onset must not sound too early
        gain = torch.stack([between, stereo], dim=2).reshape(2, 2 * num_frames, NUM_BANDS)
        gain = torch.nn.functional.pad(gain, (0, 0, 0, 1)) @ self._band_gain  # (2 channels, blocks, bins)
        padded = torch.nn.functional.pad(noise, (_NOISE_HOP, _NOISE_HOP))
        spectra = torch.fft.rfft(padded.unfold(1, _NOISE_BLOCK, _NOISE_HOP) * self._window)
        spectra *= gain
        shaped = torch.fft.irfft(spectra, n=_NOISE_BLOCK)
        shaped *= self._window
        summed = shaped[:, 1:, :_NOISE_HOP] + shaped[:, :-1, _NOISE_HOP:]  # adjacent blocks overlap by half
        return summed.reshape(2, num_frames * FRAME_SAMPLES)


def _sum_waves(amplitude: Tensor, carrier: Tensor, *, waves: Tensor) -> Tensor:
    return (torch.cat([amplitude, amplitude], dim=2) * carrier) @ waves


def _pan_gains(balance: Tensor) -> Tensor:
    """Returns the gains (2 channels, frames) of a stereo balance (frames,), with constant power.

    Both gains are 1 at balance 0. At -1 or 1 one channel is silent.
    """
    angle = (balance.clamp(-1.0, 1.0) + 1.0) * (math.pi / 4.0)
    return torch.stack([angle.cos(), angle.sin()]) * math.sqrt(2.0)


def _band_gains() -> Tensor:
    """Returns gains (bands, bins) that filter unit white noise to bands of unit RMS; adjacent bands share a bin."""
    bins = np.arange(_NOISE_BLOCK // 2 + 1) * SAMPLE_RATE_HZ / _NOISE_BLOCK
    half = SAMPLE_RATE_HZ / _NOISE_BLOCK / 2.0
    low, high = BAND_EDGES_HZ[:-1, None], BAND_EDGES_HZ[1:, None]
    share = np.clip((np.minimum(bins + half, high) - np.maximum(bins - half, low)) / (2.0 * half), 0.0, 1.0)
    width = share.sum(axis=1, keepdims=True)
    return torch.from_numpy((share * np.sqrt((_NOISE_BLOCK / 2.0) / width)).astype(np.float32))
