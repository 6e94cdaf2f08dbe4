"""Whether two sides made the same audio. A side that runs fewer steps, in another precision or with a smaller decoder
is void: its times mean nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.compare.asking import Audio

# Relative to the root mean square of the reference. Rows that share a call differ by 1e-5 at most in float32, 16-bit
# files by 1e-4 of a quiet clip. A denoiser in float16 changes a clip by more than 1e-3, a decoder in TF32 by 8e-4, one
# step fewer by more than 3e-2.
LARGEST_DIFFERENCE = 5e-4
LARGEST_HALF_DIFFERENCE = 5e-2  # where the denoiser runs in half precision


class VoidError(RuntimeError):
    """A side did other work than the one it is compared with."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """`largest_difference` is the root mean square of a clip's difference over that of the reference."""

    num_clips: int
    num_identical: int
    largest_difference: float


def checksum(audio: Audio) -> str:
    """SHA-256 of shape and samples."""
    return hashlib.sha256(repr(audio.shape).encode() + np.ascontiguousarray(audio).tobytes()).hexdigest()


def compare(
    reference: Sequence[Audio], others: Mapping[str, Sequence[Audio]], *, bound: float = LARGEST_DIFFERENCE
) -> dict[str, Comparison]:
    """Returns how each side's clips differ from the reference's. Raises VoidError naming the side that differs."""
    results = {}
    for name, clips in others.items():
        differences = [difference(mine, theirs) for mine, theirs in zip(clips, reference, strict=True)]
        identical = sum(checksum(mine) == checksum(theirs) for mine, theirs in zip(clips, reference, strict=True))
        results[name] = Comparison(len(clips), identical, max(differences))
        if not max(differences) <= bound:
            raise VoidError(
                f"{name} is void: clip {int(np.argmax(differences))} differs by {max(differences):.1e} of the "
                f"reference's level (at most {bound:g}); it did other work"
            )
    return results


def difference(clip: Audio, reference: Audio) -> float:
    """Infinite for another shape, for what is not a number, and for any sound where the reference is silent."""
    if clip.shape != reference.shape or not np.isfinite(clip).all():
        return float("inf")
    change = _level(clip - reference)
    return 0.0 if change == 0 else change / _level(reference) if _level(reference) else float("inf")


def _level(audio: Audio) -> float:
    return float(np.sqrt(np.mean(np.square(audio, dtype=np.float64))))
