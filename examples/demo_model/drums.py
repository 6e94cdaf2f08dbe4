"""Drum hits as frames of the oscillator bank, and patterns of hits in a bar of four beats."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from stable_audio_serve.models.oscillator.bank import (
    FRAME_SAMPLES,
    NUM_BANDS,
    NUM_OSCILLATORS,
    SAMPLE_RATE_HZ,
)

Array = npt.NDArray[np.float32]
FRAME_S = FRAME_SAMPLES / SAMPLE_RATE_HZ

# Voice -> (kind of hit, subdivisions per beat, which subdivisions of a four-beat bar have this hit).
BAR_PATTERNS: dict[str, list[tuple[str, int, tuple[int, ...]]]] = {
    "metronome": [("click", 1, (0, 1, 2, 3))],
    "kick": [("kick", 1, (0, 1, 2, 3))],
    "clap": [("clap", 1, (0, 1, 2, 3))],
    "snare": [("snare", 1, (0, 1, 2, 3))],
    "tom": [("tom", 1, (0, 1, 2, 3))],
    "cowbell": [("cowbell", 1, (0, 1, 2, 3))],
    "hat": [("hat", 2, (0, 1, 2, 3, 4, 5, 6, 7))],
    "drums": [("kick", 1, (0, 2)), ("snare", 1, (1, 3)), ("hat", 2, (0, 1, 2, 3, 4, 5, 6, 7))],
    "house": [("kick", 1, (0, 1, 2, 3)), ("clap", 1, (1, 3)), ("hat", 2, (1, 3, 5, 7))],
}


def _decaying(length_s: float, tau_s: float) -> Array:
    time_s = np.arange(max(1, round(length_s / FRAME_S)), dtype=np.float32) * FRAME_S
    return np.exp(-time_s / tau_s).astype(np.float32)


def _hit(
    length_s: float,
    *,
    tones: list[tuple[float, float, float]] = [],  # noqa: B006 - read only: (hertz, amplitude, tau_s)
    bands: tuple[int, int, float, float] | None = None,  # (first noise band, last band, RMS of each, decay in s)
) -> tuple[Array, Array]:
    num_frames = max(1, round(length_s / FRAME_S))
    tonal = np.zeros((num_frames, NUM_OSCILLATORS), np.float32)
    noise = np.zeros((num_frames, NUM_BANDS), np.float32)
    for frequency_hz, amplitude, tau_s in tones:
        index = round(82 + 24 * math.log2(frequency_hz / 440))
        tonal[:, index] = amplitude * _decaying(length_s, tau_s)
    if bands is not None:
        first, last, rms, tau_s = bands
        noise[:, first : last + 1] = rms * _decaying(length_s, tau_s)[:, None]
    return tonal, noise


def _falling(length_s: float, start: float, *, end: float, amplitude: float, tau_s: float) -> tuple[Array, Array]:
    """Returns the frames (tones, noise) of a decaying tone that falls from oscillator `start` to oscillator `end`."""
    tonal, noise = _hit(length_s)
    progress = np.linspace(0, 1, len(tonal))
    pitches = np.rint(start + (end - start) * np.sqrt(progress)).astype(int)
    tonal[np.arange(len(tonal)), pitches] = amplitude * _decaying(length_s, tau_s)
    return tonal, noise


def _kick() -> tuple[Array, Array]:
    """Returns the frames of a kick drum: a low tone that falls to its pitch within 30 ms, and a noise burst."""
    tonal, noise = _hit(0.22)
    time_s = np.arange(len(tonal)) * FRAME_S
    pitches = np.rint(12 + 16 * np.exp(-time_s / 0.012)).astype(int)
    tonal[np.arange(len(tonal)), pitches] = 0.8 * _decaying(0.22, 0.07)
    noise[0, 2:12] = 0.05
    return tonal, noise


HIT_SOUNDS: dict[str, tuple[Array, Array]] = {
    "kick": _kick(),
    "snare": _hit(0.2, tones=[(190.0, 0.25, 0.05)], bands=(6, 17, 0.07, 0.05)),
    "hat": _hit(0.08, bands=(15, 19, 0.05, 0.02)),
    "clap": _hit(0.16, bands=(8, 14, 0.09, 0.04)),
    "tom": _falling(0.4, 44, end=34, amplitude=0.6, tau_s=0.13),
    "cowbell": _hit(0.3, tones=[(540.0, 0.3, 0.09), (800.0, 0.25, 0.09)]),
    "click": _hit(0.05, tones=[(1500.0, 0.5, 0.014)], bands=(10, 18, 0.03, 0.008)),
    "cymbal": _hit(1.6, bands=(13, 19, 0.06, 0.4)),
    "laser": _falling(0.4, 150, end=60, amplitude=0.4, tau_s=0.25),
}
