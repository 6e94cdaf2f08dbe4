"""The fused register update: one call advances a batch of rows, each with its own sampler, step and coefficients. Rows
may keep frames of a source.

Row-independent to the last bit: terms are multiplied and added element by element in a fixed order, never by a matrix
product. A term with coefficient 0 is skipped, because 0 x NaN is NaN. Independent of networks and schedules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stable_audio_serve.sampling.plan import Evaluation, SamplerPlan

MAX_REGISTERS = 5
_NUM_TERMS = MAX_REGISTERS + 3  # the registers, v, v_uncond, noise
_UNCONDITIONAL = MAX_REGISTERS + 1
_UPDATE = MAX_REGISTERS * _NUM_TERMS
_T, _INPUT_REGISTER, _INPUT_SCALE, _BLENDED, _BLEND_SOURCE, _BLEND_NOISE, _GUIDED = range(_UPDATE, _UPDATE + 7)
NUM_VALUES = _UPDATE + 7


@dataclass(frozen=True, slots=True)
class Kept:
    """The inputs of a row's blends. In frames where `mask` (F,) bool is true, the row keeps `source` (D, F) float32.

    `noise` (D, F) float32 is eps' in `sampling/blend.py`. For B rows, every tensor has a leading axis B.
    """

    mask: Tensor
    source: Tensor
    noise: Tensor


@dataclass(frozen=True, slots=True)
class StepNumbers:
    """All numbers of one evaluation, in the order in which `StepTerms` reads them.

    `used` has the positions of the nonzero weights among them.
    """

    values: tuple[float, ...]
    used: frozenset[int]

    @classmethod
    def of(cls, evaluation: Evaluation) -> StepNumbers:
        update = [0.0] * _UPDATE
        for target, weights in enumerate(evaluation.a):
            own = [*weights, *[0.0] * (MAX_REGISTERS - len(weights))]
            own += [evaluation.b[target], evaluation.b_uncond[target], evaluation.c[target]]
            update[target * _NUM_TERMS : (target + 1) * _NUM_TERMS] = own
        blend = evaluation.blend
        blended = (float(blend.register), blend.source, blend.noise) if blend else (-1.0, 0.0, 0.0)
        register, scale, guided = float(evaluation.input_register), evaluation.input_scale, float(evaluation.guided)
        values = (*update, evaluation.t, register, scale, *blended, guided)
        return cls(values, frozenset(place for place, weight in enumerate(update) if weight != 0.0))


@dataclass(frozen=True, slots=True)
class TermUse:
    """The terms that the rows of a step use, as known on the host. Unused terms are skipped.

    `somewhere` and `everywhere` are the positions of weights that are nonzero in at least one row, and in every row.
    """

    somewhere: frozenset[int]
    everywhere: frozenset[int]
    scales_input: bool
    blends: bool

    @classmethod
    def of(cls, rows: Sequence[StepNumbers]) -> TermUse:
        """Return the terms that these rows use. Needs at least one row."""
        users = [row.used for row in rows]
        return cls(
            somewhere=users[0].union(*users),
            everywhere=users[0].intersection(*users),
            scales_input=any(row.values[_INPUT_SCALE] != 1.0 for row in rows),
            blends=any(row.values[_BLENDED] >= 0 for row in rows),
        )

    @classmethod
    def of_any(cls, num_registers: int, *, guides: bool, blends: bool) -> TermUse:
        """Return all terms that rows with this many registers can use. Without `guides`, no row is guided."""
        outputs = [term for term in range(MAX_REGISTERS, _NUM_TERMS) if guides or term != _UNCONDITIONAL]
        terms = [*range(num_registers), *outputs]
        places = frozenset(target * _NUM_TERMS + term for target in range(num_registers) for term in terms)
        return cls(places, frozenset(), scales_input=True, blends=blends)


@dataclass(frozen=True, slots=True)
class StepTerms:
    """One evaluation of each of B rows: `values` (B, NUM_VALUES) float32 on the rows' device."""

    values: Tensor
    use: TermUse

    @classmethod
    def of(cls, evaluations: Sequence[Evaluation]) -> StepTerms:
        """Return the terms on the host."""
        rows = [StepNumbers.of(evaluation) for evaluation in evaluations]
        return cls(torch.tensor([row.values for row in rows], dtype=torch.float32), TermUse.of(rows))

    @property
    def t(self) -> Tensor:
        """The times (B,)."""
        return self.values[:, _T]

    @property
    def guided(self) -> Tensor:
        """Which rows are guided, (B, 1, 1) bool."""
        return self.weight(_GUIDED) != 0.0

    def weight(self, place: int) -> Tensor:
        """Return the value at position `place` of each row, (B, 1, 1)."""
        return self.values[:, place, None, None]


def start_state(plan: SamplerPlan, noise: Tensor, *, source: Tensor | None = None, kept: Kept | None = None) -> Tensor:
    """Return a row's registers (R, D, F) float32 before its first evaluation, from `noise` and `source` (D, F)."""
    latent = plan.noise_scale * noise.float()
    if source is not None:
        latent = plan.source_scale * source.float() + latent
    state = latent.new_zeros(plan.num_registers, *latent.shape)
    state[plan.start_register] = latent
    blend = plan.start_blend
    if blend is not None:
        own = _needed(kept)
        noised = torch.zeros_like(own.source)
        for weight, part in ((blend.source, own.source), (blend.noise, own.noise)):
            if weight != 0.0:
                noised += weight * part
        state[blend.register] = torch.where(own.mask, noised, state[blend.register])
    return state


def network_input(state: Tensor, terms: StepTerms) -> Tensor:
    """Return the network's input (B, D, F) float32: each row's scaled input register in `state` (B, R, D, F)."""
    chosen = terms.weight(_INPUT_REGISTER)
    x = state[:, 0]
    for register in range(1, state.shape[1]):
        x = torch.where(chosen == register, state[:, register], x)
    return x * terms.weight(_INPUT_SCALE) if terms.use.scales_input else x


def advance(
    state: Tensor,
    terms: StepTerms,
    *,
    velocity: Tensor,
    unconditional: Tensor | None = None,
    noise: Tensor | None = None,
    kept: Kept | None = None,
) -> Tensor:
    """Return the new registers of B rows after one evaluation each.

    `state` is (B, R, D, F) float32, where R is at least the number of registers of each row; unused registers stay 0.
    `velocity` (B, D, F) is the guided network output. `unconditional` is the output of the unconditional branch, needed
    if a `b_uncond` is not 0. `noise` is unit normal, needed if a `c` is not 0. `kept` has the inputs of the blends. A
    row that does not use a term may have any values in it, even NaN.
    """
    num_registers = state.shape[1]
    missing = [None] * (MAX_REGISTERS - num_registers)
    parts: list[Tensor | None] = [*state.unbind(1), *missing, velocity, unconditional, noise]
    moved = torch.zeros_like(state)
    for target in range(num_registers):
        for position, part in enumerate(parts):
            place = target * _NUM_TERMS + position
            if place not in terms.use.somewhere:
                continue
            if part is None:
                raise ValueError("an evaluation needs the unconditional output or noise, and none was given")
            in_every_row = place in terms.use.everywhere
            _add_weighted(moved[:, target], part, weight=terms.weight(place), in_every_row=in_every_row)
    if terms.use.blends:
        _blend(moved, terms, kept=_needed(kept))
    return moved


def _add_weighted(total: Tensor, part: Tensor, *, weight: Tensor, in_every_row: bool = False) -> None:
    """Add `part` (B, D, F) times each row's `weight` (B, 1, 1) to `total` in place. Rows with weight 0 are skipped.

    Skipped rows add +0, which changes no bit, because `total` starts as +0.
    """
    product = part.float() * weight
    if not in_every_row:
        product.masked_fill_(weight == 0.0, 0.0)
    total += product


def _blend(registers: Tensor, terms: StepTerms, *, kept: Kept) -> None:
    """Blend the kept frames of one register of each row, in place in `registers` (B, R, D, F)."""
    noised = torch.zeros_like(kept.source)
    _add_weighted(noised, kept.source, weight=terms.weight(_BLEND_SOURCE))
    _add_weighted(noised, kept.noise, weight=terms.weight(_BLEND_NOISE))
    blended = terms.weight(_BLENDED)
    for target in range(registers.shape[1]):
        replaced = kept.mask[:, None] & (blended == target)
        registers[:, target] = torch.where(replaced, noised, registers[:, target])


def _needed(kept: Kept | None) -> Kept:
    if kept is None:
        raise ValueError("a blend needs what the row keeps, and nothing was given")
    return kept
