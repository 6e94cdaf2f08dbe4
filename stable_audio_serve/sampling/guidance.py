"""Guidance between network and sampler: classifier-free, adaptive projected (APG), norm threshold, rescale.

Row-independent to the last bit: every row has separate parameters. Sums are trees whose shape depends only on the
model's channels and on the frame index, so neither neighbours nor padding change the order in which a row's values are
added. Independent of networks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stable_audio_serve.sampling.plan import Guidance

NUM_GUIDANCE = 4

# Returns the sum of each row: (B, D, F) -> (B, 1, 1).
RowSum = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class GuidanceUse:
    """The optional parts of guidance that at least one row uses, as known on the host. Other parts are skipped."""

    apg: bool = True
    norm_threshold: bool = True
    rescale: bool = True

    @classmethod
    def of(cls, rows: Sequence[Guidance]) -> GuidanceUse:
        """Return the parts that these guided rows use."""
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
        """Return the rows' parameters on `device`, copied in one transfer."""
        values = torch.tensor([guidance_values(row) for row in rows], dtype=torch.float32)
        return cls(values.to(device), GuidanceUse.of(rows))

    @property
    def cfg_scale(self) -> Tensor:
        """The CFG scale of each row, (B, 1, 1)."""
        return self.values[:, 0, None, None]

    @property
    def apg_scale(self) -> Tensor:
        """The APG scale of each row, (B, 1, 1)."""
        return self.values[:, 1, None, None]

    @property
    def norm_threshold(self) -> Tensor:
        """The norm threshold of each row, (B, 1, 1)."""
        return self.values[:, 2, None, None]

    @property
    def rescale(self) -> Tensor:
        """The rescale factor of each row, (B, 1, 1)."""
        return self.values[:, 3, None, None]


def guidance_values(row: Guidance) -> tuple[float, float, float, float]:
    """Return a row's numbers in the order in which `GuidanceBatch` reads them."""
    return row.cfg_scale, row.apg_scale, row.norm_threshold, row.rescale


@dataclass(frozen=True, slots=True)
class PagedRows:
    """N rows cut into B pages.

    All pages have the same length, a power of two, so summing page by page equals summing the whole row.
    """

    pages: Tensor  # (N, P): the indices of each row's pages, in order, then B for missing pages
    rows: Tensor  # (B,): the row of each page

    def sum(self, values: Tensor) -> Tensor:
        """Return for each page the sum (B, 1, 1) of its row's `values` (B, D, F), bit-identical to that of an uncut
        row.
        """
        own = torch.nn.functional.pad(row_sum(values).flatten(), (0, 1))
        return _tree_sum(own[self.pages][..., None]).index_select(0, self.rows)


def row_sum(values: Tensor) -> Tensor:
    """Return the sum (B, 1, 1) of each row of `values` (B, D, F)."""
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
    """Return the guided output (B, D, F) float32 of rows at `x` (B, D, F), `times` (B,).

    `conditional` and `unconditional` (B, D, F) are the network's outputs in any float type. The result is v_c - (s - 1)
    d, where s is the CFG scale, v_c the conditional output, and d the difference of unconditional and conditional
    output after projection and threshold. It never divides by a time, so it is exact down to t = 0. Plain guidance and
    rescale are valid for any output that is linear in the clean estimate. Projection and threshold are defined on the
    clean estimate x - t v, so they require velocities.

    Statistics use only frames where `valid` (B, F) bool is true, or all frames if it is None. In other frames the
    result is unspecified. `add_up` sums rows; it differs for rows that are cut into pages. Parts that no row uses are
    skipped, which changes no bit of the result.
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
    """Limit the L2 norm of the difference of clean estimates to `threshold` by scaling the difference of velocities.

    The clean estimates differ by t times the difference of velocities. A threshold of 0 means no limit.
    """
    norm = times * add_up(_valid_only(difference * difference, valid)).sqrt()
    limited = difference * (threshold / norm).clamp(max=1.0)
    return torch.where(threshold > 0.0, limited, difference)


def _orthogonal_part(difference: Tensor, clean: Tensor, *, valid: Tensor | None, add_up: RowSum) -> Tensor:
    """Return `difference` without its projection on `clean`. The result is 0 in invalid frames.

    Reference: "Eliminating Oversaturation and Artifacts of High Guidance Scales" (arXiv 2410.02416), without momentum.
    """
    clean = _valid_only(clean, valid)
    floor = 1e-12 if valid is None else 1e-8  # the references use one value without a mask, another with a mask
    direction = clean / add_up(clean * clean).sqrt().clamp(min=floor)
    along = add_up(_valid_only(difference * direction, valid))
    return _valid_only(difference - along * direction, valid)


def _rescale(velocity: Tensor, v_cond: Tensor, *, amount: Tensor) -> Tensor:
    """Scale each frame of the velocity towards the standard deviation over channels of the conditional velocity."""
    matched = velocity * _channel_std(v_cond) / _channel_std(velocity)
    return torch.where(amount == 0.0, velocity, amount * matched + (1.0 - amount) * velocity)


def _channel_std(values: Tensor) -> Tensor:
    """Return the unbiased standard deviation (B, 1, F) over the channels of `values` (B, D, F)."""
    count = values.shape[1]
    centred = values - _tree_sum(values) / count
    return (_tree_sum(centred * centred) / (count - 1)).sqrt()


def _valid_only(values: Tensor, valid: Tensor | None) -> Tensor:
    """Set invalid frames to 0, even if they are NaN."""
    return values if valid is None else torch.where(valid[:, None, :], values, 0.0)


def _tree_sum(values: Tensor) -> Tensor:
    """Return the sum over axis 1, keeping the axis. Adds pairwise, so that appended zeros do not change the result."""
    while (count := values.shape[1]) > 1:
        paired = values[:, 0 : count - 1 : 2] + values[:, 1::2]
        values = torch.cat((paired, values[:, -1:]), dim=1) if count % 2 else paired
    return values
