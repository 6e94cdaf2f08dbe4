"""The facts of a finished clip besides its samples, and the names of the ways its peaks can be treated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# limit = a limiter holds peaks at 0.977; scale = as loud as fits, divided by its own peak; clip = cut off at 1.
Peaks = Literal["limit", "scale", "clip"]


@dataclass(frozen=True, slots=True)
class ClipFacts:
    """One variation as it is delivered.

    `peak` is the largest absolute sample, 1 = full scale. `loudness_lufs` is integrated over the clip (ITU-R BS.1770),
    None where that is not defined: under 0.4 s, and where nothing is above -70 LUFS. `is_silent`: every sample is below
    -70 dBFS.
    """

    seed: int
    peak: float
    loudness_lufs: float | None
    is_silent: bool
