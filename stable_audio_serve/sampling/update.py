"""The update of a sampler's registers (the latents that it keeps for a clip) after a network call. One call updates a
batch of rows (clips), each with its own sampler, step and coefficients.

The result of a row is bit-identical whatever the other rows are: terms are multiplied and added element by element in a
fixed order, not by a matrix multiplication. A term whose coefficient is 0 is skipped, because 0 x NaN is NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stable_audio_serve.sampling.plan import LATENTS, Evaluation, SamplerPlan

MAX_REGISTERS = 4
KEPT_PARTS = 3  # the tensors of `Kept`: mask, source and noise
_NUM_TERMS = MAX_REGISTERS + 3  # an update adds up the registers, the two network outputs (guided, unguided) and noise
_UNCONDITIONAL = MAX_REGISTERS + 1
_NOISE = MAX_REGISTERS + 2
_UPDATE = MAX_REGISTERS * _NUM_TERMS
_T, _INPUT_REGISTER, _INPUT_SCALE, _BLENDED, _BLEND_SOURCE, _BLEND_NOISE, _GUIDED = range(_UPDATE, _UPDATE + 7)
NUM_VALUES = _UPDATE + 7


@dataclass(frozen=True, slots=True)
class Kept:
    """The frames of a source that a row keeps. `mask` (frames,) bool is true in these frames.

    `source` (channels, frames) float32 are the source's latents. `noise` (channels, frames) float32 is added to them
    before the network sees them; it is eps' in `sampling/blend.py`. For a batch of rows, each of the three tensors has
    a leading batch axis.
    """

    mask: Tensor
    source: Tensor
    noise: Tensor


@dataclass(frozen=True, slots=True)
class StepNumbers:
    """All numbers of one `Evaluation`, in the order in which `StepTerms` reads them.

    `used` has the positions in `values` of the coefficients that are not 0.
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
    """Which terms of the update the rows of a batch use. The other terms are not computed.

    `somewhere` has the positions of the coefficients that are nonzero in at least one row. `everywhere` has the
    positions of the coefficients that are nonzero in all rows.
    """

    somewhere: frozenset[int]
    everywhere: frozenset[int]
    scales_input: bool
    blends: bool

    @classmethod
    def of(cls, rows: Sequence[StepNumbers]) -> TermUse:
        """Return the terms that these rows use. There must be at least one row."""
        users = [row.used for row in rows]
        return cls(
            somewhere=users[0].union(*users),
            everywhere=users[0].intersection(*users),
            scales_input=any(row.values[_INPUT_SCALE] != 1.0 for row in rows),
            blends=any(row.values[_BLENDED] >= 0 for row in rows),
        )

    @classmethod
    def of_any(cls, num_registers: int, *, guides: bool, blends: bool, draws: bool) -> TermUse:
        """Return all terms that any rows with this many registers can use.

        With `guides` False, no row is guided; with `blends` False, no row keeps frames of a source; with `draws`
        False, no row uses noise.
        """
        unused = {term for term, is_used in ((_UNCONDITIONAL, guides), (_NOISE, draws)) if not is_used}
        outputs = [term for term in range(MAX_REGISTERS, _NUM_TERMS) if term not in unused]
        terms = [*range(num_registers), *outputs]
        places = frozenset(target * _NUM_TERMS + term for target in range(num_registers) for term in terms)
        return cls(places, frozenset(), scales_input=True, blends=blends)


@dataclass(frozen=True, slots=True)
class StepTerms:
    """The numbers of one evaluation for each row of a batch: `values` (batch, NUM_VALUES) float32, on the device of the
    latents. The columns are in the order of `StepNumbers.values`.
    """

    values: Tensor
    use: TermUse

    @classmethod
    def of(cls, evaluations: Sequence[Evaluation]) -> StepTerms:
        """Return the numbers of these evaluations as a tensor on the CPU, one row for each."""
        rows = [StepNumbers.of(evaluation) for evaluation in evaluations]
        return cls(torch.tensor([row.values for row in rows], dtype=torch.float32), TermUse.of(rows))

    @property
    def t(self) -> Tensor:
        """The network's time of each row, as a tensor (batch,)."""
        return self.values[:, _T]

    @property
    def guided(self) -> Tensor:
        """Whether each row is guided, as a bool tensor (batch, 1, 1)."""
        return self.weight(_GUIDED) != 0.0

    def weight(self, place: int) -> Tensor:
        """Return column `place` of `values`, as a tensor (batch, 1, 1)."""
        return self.values[:, place, None, None]


def start_state(plan: SamplerPlan, noise: Tensor, *, source: Tensor | None = None, kept: Kept | None = None) -> Tensor:
    """Return a row's registers before its first evaluation: (registers, channels, frames) float32.

    `noise` and `source` are (channels, frames). `kept` is needed if the plan has blends.
    """
    latent = plan.noise_scale * noise.float()
    if source is not None:
        latent = plan.source_scale * source.float() + latent
    state = latent.new_zeros(plan.num_registers, *latent.shape)
    state[LATENTS] = latent
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
    """Return the network's input (batch, channels, frames) float32: the input register of each row times its scale.

    `state` (batch, registers, channels, frames) has the registers of all rows.
    """
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
    """Return the new registers of a batch of B rows after one evaluation of each.

    `state` (B, R, D, F) float32 has R registers per row, of D channels and F frames; registers that a row does not use
    stay 0. `velocity` (B, D, F) is the guided network output, and `unconditional` the output without the prompt, needed
    if some `b_uncond` is not 0. `noise` is standard normal, needed if some `c` is not 0. `kept` is needed if some row
    has a blend. If a row's coefficient for an input is 0, the row's values in that input are ignored, even NaN.
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
    """Add `part` (batch, channels, frames) times `weight` (batch, 1, 1) to `total`, in place.

    For rows whose weight is 0, +0 is added instead. This leaves `total` bit-identical, because `total` starts as +0.
    """
    product = part.float() * weight
    if not in_every_row:
        product.masked_fill_(weight == 0.0, 0.0)
    total += product


def _blend(registers: Tensor, terms: StepTerms, *, kept: Kept) -> None:
    """Replace the kept frames in one register of each row by the source with noise. Changes `registers` in place.

    `registers` is (batch, registers, channels, frames).
    """
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
