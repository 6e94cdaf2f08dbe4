"""Turns sampler formulas, written in Python as in papers, into the coefficients of a `SamplerPlan`.

A `Terms` is a weighted sum of a clip's registers (the latents that a sampler keeps), the network's outputs and fresh
noise. A `PlanWriter` collects the network calls of a sampler. For each call, it has one `Terms` per register, the value
of the register after the call. Coefficients are float64.
"""

from __future__ import annotations

from dataclasses import dataclass

from stable_audio_serve.sampling.plan import Evaluation, SamplerPlan

_VELOCITY, _UNCONDITIONAL, _NOISE = -1, -2, -3


@dataclass(frozen=True, slots=True)
class Terms:
    """A weighted sum of tensors. The keys of `weights` are register numbers; negative keys are outputs and noise."""

    weights: dict[int, float]

    def __add__(self, other: Terms) -> Terms:
        keys = self.weights.keys() | other.weights.keys()
        return Terms({key: self.of(key) + other.of(key) for key in keys})

    def __sub__(self, other: Terms) -> Terms:
        return self + other * -1.0

    def __mul__(self, factor: float) -> Terms:
        return Terms({key: factor * weight for key, weight in self.weights.items()})

    def __truediv__(self, divisor: float) -> Terms:
        return Terms({key: weight / divisor for key, weight in self.weights.items()})

    def of(self, key: int) -> float:
        """Return the weight for this key of `weights`; 0 if there is none."""
        return self.weights.get(key, 0.0)


def register(index: int) -> Terms:
    """Return register `index` as a sum of one term with weight 1."""
    return Terms({index: 1.0})


VELOCITY = Terms({_VELOCITY: 1.0})  # the network's guided output
UNCONDITIONAL = Terms({_UNCONDITIONAL: 1.0})  # the network's output without the prompt; only in guided evaluations
NOISE = Terms({_NOISE: 1.0})  # fresh standard normal noise


class PlanWriter:
    """Collects a plan's evaluations in order."""

    def __init__(self, num_registers: int) -> None:
        self._num_registers = num_registers
        self._evaluations: list[Evaluation] = []
        self._step_ends: list[int] = []

    def call(
        self,
        *targets: Terms,
        t: float,
        sigma: float,
        guided: bool,
        input_register: int = 0,
        input_scale: float = 1.0,
    ) -> None:
        """Add one network call to the plan. Afterwards register i is set to `targets[i]`, and further registers to 0.

        Noise is drawn if one of `targets` has a NOISE term, even with weight 0.
        """
        indices = range(self._num_registers)
        rows = [*targets, *[Terms({})] * (self._num_registers - len(targets))]
        self._evaluations.append(
            Evaluation(
                t=t,
                sigma=sigma,
                input_register=input_register,
                input_scale=input_scale,
                guided=guided,
                a=tuple(tuple(row.of(index) for index in indices) for row in rows),
                b=tuple(row.of(_VELOCITY) for row in rows),
                b_uncond=tuple(row.of(_UNCONDITIONAL) for row in rows),
                c=tuple(row.of(_NOISE) for row in rows),
                draws_noise=any(_NOISE in row.weights for row in rows),
            )
        )

    def end_step(self) -> None:
        """Mark the end of a sampler step, which can have several evaluations. Further evaluations belong to the next
        step."""
        self._step_ends.append(len(self._evaluations))

    def plan(self, *, source_scale: float, noise_scale: float) -> SamplerPlan:
        """Return the plan. Register 0 has the initial latents at the start and the result at the end.

        The initial latents are `source_scale` * source + `noise_scale` * noise.
        """
        return SamplerPlan(
            num_registers=self._num_registers,
            source_scale=source_scale,
            noise_scale=noise_scale,
            evaluations=tuple(self._evaluations),
            step_ends=tuple(self._step_ends),
        )
