"""Measurements of a finished clip, and the ways to treat its peaks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# limit = a limiter holds peaks at 0.977; scale = divide by the clip's own peak; clip = cut off at 1.
Peaks = Literal["limit", "scale", "clip"]


@dataclass(frozen=True, slots=True)
class ClipFacts:
    """Measurements of one finished variation.

    `peak` is the largest absolute sample, 1 = full scale. `loudness_lufs` is integrated over the clip (ITU-R BS.1770);
    None for clips under 0.4 s and clips below -70 LUFS throughout. `is_silent`: every sample is below -70 dBFS.
    """

    seed: int
    peak: float
    loudness_lufs: float | None
    is_silent: bool
