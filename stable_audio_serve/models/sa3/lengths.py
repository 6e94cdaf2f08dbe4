"""Converts a duration in seconds to latent frames. Pure arithmetic, no tensors."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LengthRule:
    """A checkpoint's length limits: the longest window has `max_samples`; F must be a multiple of `frame_multiple`."""

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
    """One row's lengths. `frames` are all latent frames, of which attention uses the first `valid_frames`.

    `effective_frames` are those of the clip without headroom, for length-dependent schedules.
    """

    frames: int
    valid_frames: int
    effective_frames: int
    output_samples: int


def plan_length(duration_s: float, rule: LengthRule, *, padding_s: float, frames: int | None = None) -> RowLength:
    """Returns the lengths of a row of `duration_s` > 0 with `padding_s` of headroom.

    `frames` covers the clip (at least one sample) and its headroom, rounded up to the multiple, then limited to the
    longest window. `valid_frames` are the clip's frames, rounded up, and those of the headroom, rounded down. The
    argument `frames` overrides the latent length, as for a row in the batch of a longer row.
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
