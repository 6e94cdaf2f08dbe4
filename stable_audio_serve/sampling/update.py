"""The fused register update: one call advances a batch whose rows each have their own sampler, step and coefficients.

Row-independent to the last bit: an element-wise multiply-add chain in a fixed order, never a matrix product, where a
zero coefficient leaves the sum untouched (0 x NaN is NaN). Knows nothing of networks or schedules.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stable_audio_serve.sampling.plan import Evaluation, SamplerPlan


def start_state(plan: SamplerPlan, noise: Tensor, *, source: Tensor | None = None) -> Tensor:
    """Returns a row's registers (R, D, F) float32 before its first evaluation, from `noise` and `source` (D, F)."""
    latent = plan.noise_scale * noise.float()
    if source is not None:
        latent = plan.source_scale * source.float() + latent
    state = latent.new_zeros(plan.num_registers, *latent.shape)
    state[plan.start_register] = latent
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
) -> Tensor:
    """Returns the new registers of B rows after one evaluation each.

    `state` (B, R, D, F) float32, R at least every row's number of registers (the others stay 0). `velocity` (B, D, F)
    is the guided network output, `unconditional` the other branch's (needed only where `b_uncond` is not 0), `noise`
    unit normal (needed only where `c` is not 0); rows that do not use a term may hold anything there.
    """
    num_registers = state.shape[1]
    table = [_coefficients(evaluation, num_registers) for evaluation in evaluations]
    on_device = torch.tensor(table, dtype=torch.float32).permute(1, 2, 0)[..., None, None].to(state.device)
    terms: list[Tensor | None] = [*state.unbind(1), velocity, unconditional, noise]
    registers = []
    for target in range(num_registers):
        total = torch.zeros_like(state[:, 0])
        for position, term in enumerate(terms):
            users = sum(row[target][position] != 0.0 for row in table)
            if users == 0:
                continue
            if term is None:
                raise ValueError("an evaluation needs the unconditional output or noise, and none was given")
            weight = on_device[target, position]
            added = total + weight * term.float()
            total = added if users == len(table) else torch.where(weight != 0.0, added, total)
        registers.append(total)
    return torch.stack(registers, dim=1)


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
