"""Converts a duration in seconds to latent frames. Pure arithmetic, no tensors."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LengthRule:
    """A checkpoint's rule for lengths: a multiple of `frame_multiple` latent frames, and at most `max_samples`."""

    sample_rate_hz: int
    hop: int
    frame_multiple: int
    max_samples: int

    @property
    def max_frames(self) -> int:
        """The largest number of latent frames."""
        return self.max_samples // self.hop


@dataclass(frozen=True, slots=True)
class RowLength:
    """The lengths of one batch row. `frames` counts all latent frames; attention uses the first `valid_frames` of them.

    `effective_frames` counts the frames of the clip without padding. Schedules that depend on length use this number.
    """

    frames: int
    valid_frames: int
    effective_frames: int
    output_samples: int


def plan_length(duration_s: float, rule: LengthRule, *, padding_s: float, frames: int | None = None) -> RowLength:
    """Returns the lengths of a row for a clip of `duration_s` > 0 seconds and `padding_s` seconds generated after it.

    The result's `frames` covers the clip and the padding, is rounded up to `rule.frame_multiple` and then limited by
    `rule.max_samples`. Its `valid_frames` is the clip's length in frames, rounded up, plus the padding's length,
    rounded down. The argument `frames` overrides the number of latent frames, for a row that is padded to the length of
    a longer row.
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
