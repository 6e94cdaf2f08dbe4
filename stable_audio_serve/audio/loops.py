"""The arithmetic of loops: the tempo in a prompt, the bars that fit into a window, and a length exact to the sample.

Independent of audio and dialects.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

BEATS_PER_BAR = 4
BAR_COUNTS = (1, 2, 4, 8)

_OVERHANG_S = 1.0  # how far explicit bars may exceed the window before they are halved
# Matches only at the start of a run of digits and never backtracks, so even malicious text takes linear time. No tempo
# has more than 18 digits.
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
        """Returns the length in whole samples, rounded down. Integer arithmetic, because a float could be too small."""
        return self.bars * BEATS_PER_BAR * 60 * sample_rate_hz // self.tempo_bpm


def read_tempo(prompt: str) -> int | None:
    """Returns beats per minute: the first digits before "bpm", in any case; None if there are none or they are 0."""
    found = _TEMPO.search(prompt)
    return int(found[1]) or None if found else None


def plan_loop(tempo_bpm: int, *, bars: int | None, window_s: float) -> Loop:
    """Returns the loop to cut from a window of `window_s` seconds.

    Without `bars` it has the most of 8, 4, 2 and 1 bars that fit, or 1 if none fits. Given `bars` that exceed the
    window by more than a second are halved once, to at least 1; the caller cuts a loop that is still too long.
    """
    if bars is None:
        fitting = (count for count in reversed(BAR_COUNTS) if Loop(tempo_bpm, count).duration_s <= window_s)
        return Loop(tempo_bpm, next(fitting, 1))
    loop = Loop(tempo_bpm, bars)
    return loop if loop.duration_s <= window_s + _OVERHANG_S else Loop(tempo_bpm, max(1, bars // 2))
