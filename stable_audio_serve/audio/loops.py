"""Arithmetic of loops: the tempo in a prompt, the bars that fit into the model's window, and the exact length."""

from __future__ import annotations

import re
from dataclasses import dataclass

BEATS_PER_BAR = 4
BAR_COUNTS = (1, 2, 4, 8)

_OVERHANG_S = 1.0  # if the requested bars exceed the window by more than this, half as many are used
# The pattern starts only at the first digit of a number and never backtracks, so the search takes linear time.
_TEMPO = re.compile(r"(?<!\d)(\d{1,18}+)\s*+bpm", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Loop:
    """Whole bars of four beats at a tempo above 0."""

    tempo_bpm: int
    bars: int

    @property
    def bar_s(self) -> float:
        """Length of one bar in seconds."""
        return BEATS_PER_BAR * 60 / self.tempo_bpm

    @property
    def duration_s(self) -> float:
        """Length in seconds."""
        return self.bars * BEATS_PER_BAR * 60 / self.tempo_bpm

    def num_samples(self, sample_rate_hz: int) -> int:
        """Return the length in samples, rounded down. Integers are used, because floats could give one less."""
        return self.bars * BEATS_PER_BAR * 60 * sample_rate_hz // self.tempo_bpm


def read_tempo(prompt: str) -> int | None:
    """Return the tempo that a prompt contains as "<digits>bpm", ignoring case. None if there is no tempo above 0."""
    found = _TEMPO.search(prompt)
    return int(found[1]) or None if found else None


def plan_loop(tempo_bpm: int, *, bars: int | None, window_s: float) -> Loop:
    """Return the loop to cut from a window of `window_s` seconds.

    Without `bars` the loop has the largest of 8, 4, 2 and 1 bars that fits into the window, or 1 bar if none fits. If
    the requested `bars` are more than a second longer than the window, the loop has half as many, but at least 1. The
    loop may still be longer than the window.
    """
    if bars is None:
        fitting = (count for count in reversed(BAR_COUNTS) if Loop(tempo_bpm, count).duration_s <= window_s)
        return Loop(tempo_bpm, next(fitting, 1))
    loop = Loop(tempo_bpm, bars)
    return loop if loop.duration_s <= window_s + _OVERHANG_S else Loop(tempo_bpm, max(1, bars // 2))
