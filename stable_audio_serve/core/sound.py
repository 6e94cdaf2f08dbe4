"""Measurements of a finished clip, and the ways to handle peaks above full scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# Ways to handle peaks. limit: a limiter keeps them at or below 0.977. scale: the clip is divided by its peak. clip:
# samples above 1 are set to 1.
Peaks = Literal["limit", "scale", "clip"]


@dataclass(frozen=True, slots=True)
class ClipFacts:
    """Measurements of one finished variation.

    `peak` is the largest absolute sample, 1 = full scale. `loudness_lufs` is the integrated loudness (ITU-R BS.1770),
    None for clips shorter than 0.4 s and for clips that never exceed -70 LUFS. `is_silent` means that every sample is
    below -70 dBFS.
    """

    seed: int
    peak: float
    loudness_lufs: float | None
    is_silent: bool
