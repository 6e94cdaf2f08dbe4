"""Brownian motion over noise levels, with the random numbers of the reference implementations. It serves to repeat runs
of the reference implementations for verification.

Generation does not need this module. The steps of a sampler do not overlap, so the increments of a Brownian path over
the steps are independent, and one normal draw per step has the same distribution.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_DECIMALS = 6  # noise levels are rounded to 6 decimals
_POOL_SIZE = 24
MAX_ENTROPY = 2**63 - 1  # the random integer that determines a path is below this


class BrownianTree:
    """A path W of Brownian motion over the noise levels `start`..`end`, determined by the integer `entropy`.

    W is computed by bisection (Levy's construction), so an increment depends only on its two levels, not on earlier
    calls. The random seeds are the same as in torchsde's Brownian tree ("Efficient and Accurate Gradients for Neural
    SDEs", arXiv 2105.13493).
    """

    def __init__(self, entropy: int, *, start: float, end: float, shape: tuple[int, ...]) -> None:
        """`shape` is the shape of W at one level."""
        self._entropy = entropy
        self._shape = shape
        self._start, self._end = round(start, _DECIMALS), round(end, _DECIMALS)
        words = np.random.SeedSequence(entropy, pool_size=_POOL_SIZE).generate_state(3)
        self._total = math.sqrt(end - start) * self._normal(int(words[0]))

    def increment(self, low: float, high: float) -> Tensor:
        """Return W(high) - W(low), of shape `shape`, float32 on the CPU. Levels are clamped to `start`..`end`."""
        return (self._value(high) - self._value(low)).float()

    def _value(self, level: float) -> Tensor:
        """Return W(level) - W(start), float64."""
        wanted = min(max(round(level, _DECIMALS), self._start), self._end)
        low, high, across = self._start, self._end, self._total
        value = torch.zeros_like(across)
        key, depth = 0, 0
        while wanted not in (low, high):
            middle = round((low + high) / 2, _DECIMALS)
            spread = math.sqrt((middle - low) * (high - middle) / (high - low))
            left = across * ((middle - low) / (high - low)) + spread * self._node(key, depth)
            key, depth = 2 * key, depth + 1
            if wanted <= middle:
                high, across = middle, left
            else:
                value, low, across, key = value + left, middle, across - left, key + 1
        return value if wanted == low else value + across

    def _node(self, key: int, depth: int) -> Tensor:
        sequence = np.random.SeedSequence(self._entropy, spawn_key=(key, depth), pool_size=_POOL_SIZE)
        return self._normal(int(sequence.generate_state(4)[0]))

    def _normal(self, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(self._shape, generator=generator, dtype=torch.float32).double()


def brownian_steps(entropy: int, sigmas: Sequence[float], *, shape: tuple[int, ...]) -> list[Tensor]:
    """Return the noise of each step between two positive, adjacent levels of the descending `sigmas`.

    For the step from level s to level n the noise is `-(W(s) - W(n)) / sqrt(s - n)`, where W is the Brownian path. Its
    variance is 1, and it has shape `shape`, float32 on the CPU.
    """
    levels = [sigma for sigma in sigmas if sigma > 0.0]
    tree = BrownianTree(entropy, start=min(levels), end=max(levels), shape=shape)
    return [-tree.increment(n, s) / math.sqrt(s - n) for s, n in itertools.pairwise(levels)]


@dataclass(frozen=True, slots=True)
class ReplayPath:
    """The Brownian path of a run of the reference implementation over `sigmas`.

    `shape` is the shape of the whole batch. The path provides the sampler's noise: one draw for each step between two
    positive levels, with the stage "step" and the indices 0, 1, ...
    """

    sigmas: tuple[float, ...]
    shape: tuple[int, ...]

    def make(self, generator: torch.Generator) -> dict[tuple[str, int], Tensor]:
        """Return the draws; the keys are (stage, index). Takes one random integer from the generator."""
        entropy = int(torch.randint(0, MAX_ENTROPY, [], generator=generator))
        steps = brownian_steps(entropy, self.sigmas, shape=self.shape)
        return {("step", index): noise for index, noise in enumerate(steps)}
