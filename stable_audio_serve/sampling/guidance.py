"""Guidance, computed from the network's outputs before the sampler uses them: classifier-free (CFG), adaptive projected
(APG), norm threshold, and rescale.

Each row of a batch has its own parameters. The result of a row is bit-identical whatever the other rows are. Sums are
computed in pairs: values are added in pairs, then these sums in pairs, and so on. Which values form a pair depends only
on the channel and the frame, so padding does not change the result either.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stable_audio_serve.sampling.plan import Guidance

NUM_GUIDANCE = 4

# Returns the sum of each row of a batch: (batch, channels, frames) -> (batch, 1, 1).
RowSum = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class GuidanceUse:
    """Which optional parts of guidance at least one row of the batch uses. The other parts are not computed."""

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
    """The guidance parameters of a batch: `values` (batch, NUM_GUIDANCE) float32, on the device of the latents."""

    values: Tensor
    use: GuidanceUse

    @classmethod
    def of(cls, rows: Sequence[Guidance], *, device: torch.device | None = None) -> GuidanceBatch:
        """Return the parameters of these rows, as tensors on `device`."""
        values = torch.tensor([guidance_values(row) for row in rows], dtype=torch.float32)
        return cls(values.to(device), GuidanceUse.of(rows))


def guidance_values(row: Guidance) -> tuple[float, float, float, float]:
    """Return the guidance parameters of one row in the order of the columns of `GuidanceBatch.values`."""
    return row.cfg_scale, row.apg_scale, row.norm_threshold, row.rescale


@dataclass(frozen=True, slots=True)
class PagedRows:
    """N rows of different lengths, cut into B pages (pieces) of equal length. Each row has at most P pages.

    The length of a page is a power of two. Adding the sums of a row's pages in pairs is therefore the same computation
    as adding all values of the row in pairs.
    """

    pages: Tensor  # (N, P): the indices of each row's pages, in order; B where a row has fewer pages
    rows: Tensor  # (B,): the index of the row to which each page belongs

    def sum(self, values: Tensor) -> Tensor:
        """Return for each page the sum (B, 1, 1) of all `values` (B, channels, frames) of the page's row.

        The sum is bit-identical to the sum of the same row if it is not cut into pages.
        """
        own = torch.nn.functional.pad(row_sum(values).flatten(), (0, 1))
        return _tree_sum(own[self.pages][..., None]).index_select(0, self.rows)


def row_sum(values: Tensor) -> Tensor:
    """Return the sum (batch, 1, 1) of each row of `values` (batch, channels, frames)."""
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
    """Return the guided network output (B, D, F) float32 for latents `x` (B, D, F) at `times` (B,).

    B is the batch, D the channels, F the frames. `conditional` and `unconditional` (B, D, F) are the network's outputs
    in any float type. The result is v_c - (s - 1) d. Here s is the CFG scale and v_c the conditional output. d is the
    unconditional minus the conditional output, after projection (APG) and norm threshold. No formula divides by t, so
    the result is exact down to t = 0. CFG and rescale are valid for any output that is linear in the clean estimate.
    Projection and threshold need the clean estimate x - t v, so the output must be a velocity v.

    Norms and projections use only the frames where `valid` (B, F) bool is true; None means all frames. In other frames
    the result is arbitrary. `add_up` computes the sum of each row. If rows are cut into pages, pass `PagedRows.sum`.
    Parts of guidance that no row uses are not computed, which changes no bit of the result.
    """
    x, t = x.float(), times.float()[:, None, None]
    cfg_scale, apg_scale, norm_threshold, rescale = rows.values[:, :, None, None].unbind(1)  # (B, 1, 1) each
    v_cond = conditional.float()
    difference = unconditional.float() - v_cond
    if rows.use.norm_threshold:
        difference = _limit_norm(difference, valid, times=t, threshold=norm_threshold, add_up=add_up)
    if rows.use.apg:
        orthogonal = _orthogonal_part(difference, x - t * v_cond, valid=valid, add_up=add_up)
        mixed = apg_scale * orthogonal + (1.0 - apg_scale) * difference
        difference = torch.where(apg_scale == 0.0, difference, mixed)
    output = v_cond - (cfg_scale - 1.0) * difference
    if rows.use.rescale:
        output = _rescale(output, v_cond, amount=rescale)
    return output


def _limit_norm(
    difference: Tensor, valid: Tensor | None, *, times: Tensor, threshold: Tensor, add_up: RowSum
) -> Tensor:
    """Scale `difference` (of two velocities) down so that the clean estimates differ by an L2 norm of at most
    `threshold`. Returns the scaled difference.

    The difference of the clean estimates is the time t multiplied by the difference of the velocities. A threshold of 0
    means no limit.
    """
    norm = times * add_up(_valid_only(difference * difference, valid)).sqrt()
    limited = difference * (threshold / norm).clamp(max=1.0)
    return torch.where(threshold > 0.0, limited, difference)


def _orthogonal_part(difference: Tensor, clean: Tensor, *, valid: Tensor | None, add_up: RowSum) -> Tensor:
    """Return the part of `difference` that is orthogonal to `clean`; 0 in frames that are not valid.

    This is the projection of "Eliminating Oversaturation and Artifacts of High Guidance Scales" (arXiv 2410.02416),
    without that paper's momentum.
    """
    clean = _valid_only(clean, valid)
    # To avoid a division by 0. The reference implementations use 1e-12 without a mask and 1e-8 with a mask.
    floor = 1e-12 if valid is None else 1e-8
    direction = clean / add_up(clean * clean).sqrt().clamp(min=floor)
    along = add_up(_valid_only(difference * direction, valid))
    return _valid_only(difference - along * direction, valid)


def _rescale(velocity: Tensor, v_cond: Tensor, *, amount: Tensor) -> Tensor:
    """Scale each frame of `velocity` so that its standard deviation over the channels is nearer to the one of `v_cond`.

    If `amount` is 1, the two standard deviations become equal. If `amount` is 0, nothing changes, nor in a frame whose
    channels are equal.
    """
    deviation = _channel_std(velocity)
    matched = torch.where(deviation > 0.0, velocity * _channel_std(v_cond) / deviation, velocity)
    return torch.where(amount == 0.0, velocity, amount * matched + (1.0 - amount) * velocity)


def _channel_std(values: Tensor) -> Tensor:
    """Return the unbiased standard deviation over the channels: (batch, channels, frames) -> (batch, 1, frames)."""
    count = values.shape[1]
    centred = values - _tree_sum(values) / count
    return (_tree_sum(centred * centred) / (count - 1)).sqrt()


def _valid_only(values: Tensor, valid: Tensor | None) -> Tensor:
    """Return `values` with zeros in the frames where `valid` is false, even if the values there are NaN."""
    return values if valid is None else torch.where(valid[:, None, :], values, 0.0)


def _tree_sum(values: Tensor) -> Tensor:
    """Return the sum over axis 1, which stays as an axis of length 1.

    Values are added in pairs, so that zeros at the end leave the sum bit-identical.
    """
    while (count := values.shape[1]) > 1:
        paired = values[:, 0 : count - 1 : 2] + values[:, 1::2]
        values = torch.cat((paired, values[:, -1:]), dim=1) if count % 2 else paired
    return values
