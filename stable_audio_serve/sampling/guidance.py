"""Guidance between the network and the sampler: classifier-free, adaptive projected (APG), norm threshold, rescale.

Row-independent to the last bit: every row has its own parameters, and sums are trees whose shape depends only on the
model's channels and on the frame index, so neither neighbours nor padding change how a row's values are added. Knows
nothing of networks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stable_audio_serve.sampling.plan import Guidance

NUM_GUIDANCE = 4

# Adds up each row of (B, D, F): (B, 1, 1).
RowSum = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class GuidanceUse:
    """Which of the optional parts any row uses, known without looking at the device; the others are skipped."""

    apg: bool = True
    norm_threshold: bool = True
    rescale: bool = True

    @classmethod
    def of(cls, rows: Sequence[Guidance]) -> GuidanceUse:
        """Returns the use of guided rows."""
        return cls(
            apg=any(row.apg_scale != 0.0 for row in rows),
            norm_threshold=any(row.norm_threshold > 0.0 for row in rows),
            rescale=any(row.rescale != 0.0 for row in rows),
        )


@dataclass(frozen=True, slots=True)
class GuidanceBatch:
    """The parameters of B guided rows: `values` (B, NUM_GUIDANCE) float32 on their device."""

    values: Tensor
    use: GuidanceUse

    @classmethod
    def of(cls, rows: Sequence[Guidance], *, device: torch.device | None = None) -> GuidanceBatch:
        """Returns the rows' parameters on `device`, copied in one transfer."""
        values = torch.tensor([guidance_values(row) for row in rows], dtype=torch.float32)
        return cls(values.to(device), GuidanceUse.of(rows))

    @property
    def cfg_scale(self) -> Tensor:
        """(B, 1, 1)."""
        return self.values[:, 0, None, None]

    @property
    def apg_scale(self) -> Tensor:
        """(B, 1, 1)."""
        return self.values[:, 1, None, None]

    @property
    def norm_threshold(self) -> Tensor:
        """(B, 1, 1)."""
        return self.values[:, 2, None, None]

    @property
    def rescale(self) -> Tensor:
        """(B, 1, 1)."""
        return self.values[:, 3, None, None]


def guidance_values(row: Guidance) -> tuple[float, float, float, float]:
    """Returns a row's numbers in the order in which `GuidanceBatch` reads them."""
    return row.cfg_scale, row.apg_scale, row.norm_threshold, row.rescale


@dataclass(frozen=True, slots=True)
class PagedRows:
    """N rows cut into B pages of as many frames, a power of two: how to add up a row as if it lay in one piece."""

    pages: Tensor  # (N, P): each row's pages, in order; B for those that it does not have
    rows: Tensor  # (B,): each page's row

    def sum(self, values: Tensor) -> Tensor:
        """Returns each page's row's sum (B, 1, 1) of (B, D, F), to the bit what an uncut row gives."""
        own = torch.nn.functional.pad(row_sum(values).flatten(), (0, 1))
        return _tree_sum(own[self.pages][..., None]).index_select(0, self.rows)


def row_sum(values: Tensor) -> Tensor:
    """Returns the sum of each row of (B, D, F): (B, 1, 1)."""
    return _tree_sum(_tree_sum(values).transpose(1, 2))


def guide(
    x: Tensor,
    times: Tensor,
    *,
    conditional: Tensor,
    unconditional: Tensor,
    valid: Tensor | None,
    rows: GuidanceBatch,
    add_up: RowSum = row_sum,
) -> Tensor:
    """Returns the guided output (B, D, F) float32 of rows at `x` (B, D, F), `times` (B,).

    `conditional` and `unconditional` (B, D, F) are the network's, any float type. Plain guidance and rescale hold for
    any output that is linear in the clean estimate; the projection and the threshold, which are defined on that
    estimate, for velocities (x - t v). The formula divides by no time, so it is exact down to t = 0:
    v_c - (s - 1) d, with d = v_u - v_c after projection and threshold. Statistics use only frames where `valid`
    (B, F) bool is true, all of them if it is None; elsewhere the result is unspecified. `add_up` differs where a row is
    in several pieces. A part that no row uses is
    skipped, which changes no bit of the others: its weight would be exactly 0 or 1.
    """
    x, t = x.float(), times.float()[:, None, None]
    v_cond = conditional.float()
    difference = unconditional.float() - v_cond
    if rows.use.norm_threshold:
        difference = _limit_norm(difference, valid, times=t, threshold=rows.norm_threshold, add_up=add_up)
    if rows.use.apg:
        orthogonal = _orthogonal_part(difference, x - t * v_cond, valid=valid, add_up=add_up)
        mixed = rows.apg_scale * orthogonal + (1.0 - rows.apg_scale) * difference
        difference = torch.where(rows.apg_scale == 0.0, difference, mixed)
    output = v_cond - (rows.cfg_scale - 1.0) * difference
    if rows.use.rescale:
        output = _rescale(output, v_cond, amount=rows.rescale)
    return output


def _limit_norm(
    difference: Tensor, valid: Tensor | None, *, times: Tensor, threshold: Tensor, add_up: RowSum
) -> Tensor:
    """Returns the difference of velocities, scaled in rows where the clean estimates' would exceed L2 norm `threshold`.

    Clean estimates differ by t times as much; 0 is no threshold.
    """
    norm = times * add_up(_valid_only(difference * difference, valid)).sqrt()
    limited = difference * (threshold / norm).clamp(max=1.0)
    return torch.where(threshold > 0.0, limited, difference)


def _orthogonal_part(difference: Tensor, clean: Tensor, *, valid: Tensor | None, add_up: RowSum) -> Tensor:
    """Returns `difference` without its projection on `clean`; 0 on invalid frames.

    Reference: "Eliminating Oversaturation and Artifacts of High Guidance Scales" (arXiv 2410.02416), without momentum.
    """
    clean = _valid_only(clean, valid)
    floor = 1e-12 if valid is None else 1e-8  # the references' two variants
    direction = clean / add_up(clean * clean).sqrt().clamp(min=floor)
    along = add_up(_valid_only(difference * direction, valid))
    return _valid_only(difference - along * direction, valid)


def _rescale(velocity: Tensor, v_cond: Tensor, *, amount: Tensor) -> Tensor:
    """Returns the velocity, blended towards the conditional one's standard deviation over channels, per frame."""
    matched = velocity * _channel_std(v_cond) / _channel_std(velocity)
    return torch.where(amount == 0.0, velocity, amount * matched + (1.0 - amount) * velocity)


def _channel_std(values: Tensor) -> Tensor:
    """Returns the unbiased standard deviation over D of (B, D, F): (B, 1, F)."""
    count = values.shape[1]
    centred = values - _tree_sum(values) / count
    return (_tree_sum(centred * centred) / (count - 1)).sqrt()


def _valid_only(values: Tensor, valid: Tensor | None) -> Tensor:
    """Returns the values with 0 in invalid frames, even where they hold NaN."""
    return values if valid is None else torch.where(valid[:, None, :], values, 0.0)


def _tree_sum(values: Tensor) -> Tensor:
    """Returns the sum over axis 1 (kept), added pairwise so that zeros appended to the axis change no bit."""
    while (count := values.shape[1]) > 1:
        paired = values[:, 0 : count - 1 : 2] + values[:, 1::2]
        values = torch.cat((paired, values[:, -1:]), dim=1) if count % 2 else paired
    return values
