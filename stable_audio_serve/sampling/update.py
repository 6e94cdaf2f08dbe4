"""The fused register update: one call advances a batch whose rows each have their own sampler, step and coefficients,
and some of which keep frames of a source.

Row-independent to the last bit: an element-wise multiply-add chain in a fixed order, never a matrix product, where a
zero coefficient leaves the sum untouched (0 x NaN is NaN). Knows nothing of networks or schedules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stable_audio_serve.sampling.plan import Blend, Evaluation, SamplerPlan


@dataclass(frozen=True, slots=True)
class Kept:
    """What a row with a blended plan keeps: frames where `mask` (F,) bool is true have the latents `source` (D, F).

    `noise` (D, F) is the eps' of the blend; both float32. For B rows together every tensor has B in front.
    """

    mask: Tensor
    source: Tensor
    noise: Tensor


def start_state(plan: SamplerPlan, noise: Tensor, *, source: Tensor | None = None, kept: Kept | None = None) -> Tensor:
    """Returns a row's registers (R, D, F) float32 before its first evaluation, from `noise` and `source` (D, F)."""
    latent = plan.noise_scale * noise.float()
    if source is not None:
        latent = plan.source_scale * source.float() + latent
    state = latent.new_zeros(plan.num_registers, *latent.shape)
    state[plan.start_register] = latent
    if plan.start_blend is not None:
        own = _needed(kept)
        _blend(state[None], [plan.start_blend], kept=Kept(own.mask[None], own.source[None], own.noise[None]))
    return state


def network_input(state: Tensor, evaluations: Sequence[Evaluation]) -> Tensor:
    """Returns the network's input: each row's input register, scaled; `state` (B, R, D, F) -> (B, D, F) float32."""
    registers = torch.tensor([evaluation.input_register for evaluation in evaluations], device=state.device)
    x = state[torch.arange(len(evaluations), device=state.device), registers]
    if all(evaluation.input_scale == 1.0 for evaluation in evaluations):
        return x
    scales = torch.tensor([evaluation.input_scale for evaluation in evaluations], dtype=torch.float32)
    return x * scales[:, None, None].to(state.device)


def advance(
    state: Tensor,
    evaluations: Sequence[Evaluation],
    *,
    velocity: Tensor,
    unconditional: Tensor | None = None,
    noise: Tensor | None = None,
    kept: Kept | None = None,
) -> Tensor:
    """Returns the new registers of B rows after one evaluation each.

    `state` (B, R, D, F) float32, R at least every row's number of registers (the others stay 0). `velocity` (B, D, F)
    is the guided network output, `unconditional` the other branch's (needed only where `b_uncond` is not 0), `noise`
    unit normal (needed only where `c` is not 0), `kept` what blends keep; rows that do not use a term may hold
    anything there.
    """
    num_registers = state.shape[1]
    table = [_coefficients(evaluation, num_registers) for evaluation in evaluations]
    on_device = torch.tensor(table, dtype=torch.float32).permute(1, 2, 0)[..., None, None].to(state.device)
    terms: list[Tensor | None] = [*state.unbind(1), velocity, unconditional, noise]
    moved = torch.zeros_like(state)
    for target in range(num_registers):
        _add_weighted(moved[:, target], terms, table=[row[target] for row in table], weights=on_device[target])
    blends = [evaluation.blend for evaluation in evaluations]
    if any(blends):
        _blend(moved, blends, kept=_needed(kept))
    return moved


def _add_weighted(
    total: Tensor, terms: Sequence[Tensor | None], *, table: Sequence[Sequence[float]], weights: Tensor
) -> None:
    """Add the terms (B, D, F), each weighted per row by `table` (B, T) = `weights` (T, B, 1, 1), to `total` in place.

    `total` must begin as +0: adding the +0 of a row that skips a term then changes no bit.
    """
    product = torch.empty_like(total, memory_format=torch.contiguous_format)
    for position, term in enumerate(terms):
        users = sum(row[position] != 0.0 for row in table)
        if users == 0:
            continue
        if term is None:
            raise ValueError("an evaluation needs the unconditional output or noise, and none was given")
        torch.mul(term.float(), weights[position], out=product)
        if users < len(table):
            product.masked_fill_(weights[position] == 0.0, 0.0)
        total += product


def _blend(registers: Tensor, blends: Sequence[Blend | None], *, kept: Kept) -> None:
    """Replace, in place, the kept frames of each row's blended register; `registers` (B, R, D, F)."""
    table = [(blend.source, blend.noise) if blend else (0.0, 0.0) for blend in blends]
    weights = torch.tensor(table, dtype=torch.float32).T[..., None, None].to(registers.device)
    noised = torch.zeros_like(kept.source)
    _add_weighted(noised, [kept.source, kept.noise], table=table, weights=weights)
    blended = torch.tensor([blend.register if blend else -1 for blend in blends]).to(registers.device)
    for target in {blend.register for blend in blends if blend}:
        replaced = kept.mask & (blended == target)[:, None]
        registers[:, target] = torch.where(replaced[:, None], noised, registers[:, target])


def _needed(kept: Kept | None) -> Kept:
    if kept is None:
        raise ValueError("a blend needs what the row keeps, and nothing was given")
    return kept


def _coefficients(evaluation: Evaluation, num_registers: int) -> list[list[float]]:
    """Returns, per target register, its weights on every register, then on v, v_uncond and noise."""
    missing = [0.0] * (num_registers - len(evaluation.b))
    rows = [
        [*weights, *missing, v, v_uncond, noise]
        for weights, v, v_uncond, noise in zip(
            evaluation.a, evaluation.b, evaluation.b_uncond, evaluation.c, strict=True
        )
    ]
    return rows + [[0.0] * (num_registers + 3) for _ in missing]
