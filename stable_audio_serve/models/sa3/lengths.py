"""Converts a duration in seconds to latent frames. Pure arithmetic, no tensors."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LengthRule:
    """A checkpoint's length limits: `max_samples` is the longest window, F is a multiple of `frame_multiple`."""

    sample_rate_hz: int
    hop: int
    frame_multiple: int
    max_samples: int

    @property
    def max_frames(self) -> int:
        """Latent frames of the longest window."""
        return self.max_samples // self.hop


@dataclass(frozen=True, slots=True)
class RowLength:
    """One row's lengths: `frames` with headroom, `valid_frames` of them attended, `effective_frames` of the clip itself
    (for length-dependent schedules), and the exact `output_samples`.
    """

    frames: int
    valid_frames: int
    effective_frames: int
    output_samples: int


def plan_length(duration_s: float, rule: LengthRule, *, padding_s: float, frames: int | None = None) -> RowLength:
    """Returns the lengths of a row of `duration_s` > 0 with `padding_s` of headroom.

    The clip, at least one sample, and its headroom are rounded up to whole frames, then to the multiple, then capped.
    In `valid_frames` the headroom counts in whole frames. `frames` overrides the latent length, as for a row that
    shares a longer row's batch.
    """
    clip_samples = max(int(duration_s * rule.sample_rate_hz), 1)
    if frames is None:
        padded = max(int((duration_s + padding_s) * rule.sample_rate_hz), clip_samples)
        whole = -(-padded // (rule.hop * rule.frame_multiple)) * rule.hop * rule.frame_multiple
        frames = min(whole, rule.max_samples) // rule.hop
    effective = -(-clip_samples // rule.hop)
    headroom = int(padding_s * rule.sample_rate_hz / rule.hop)
    return RowLength(
        frames=frames,
        valid_frames=max(min(effective + headroom, frames), 1),
        effective_frames=effective,
        output_samples=min(clip_samples, frames * rule.hop),
    )
