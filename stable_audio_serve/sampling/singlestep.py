"""Samplers over noise levels sigma with several network calls per step. Unlike the samplers in `multistep`, they use no
results of earlier steps.

In the code a step goes from level s to level n, d is the clean estimate D(x, s), and k = (x - d) / s is the slope
dx/dsigma. Each function adds all steps of its sampler to a plan. Levels are float32 values, and intermediate levels are
computed in the same order of operations as in the reference implementations.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from stable_audio_serve.core.errors import InvalidRequestError
from stable_audio_serve.sampling.karras import SigmaRange
from stable_audio_serve.sampling.schedules import check_steps
from stable_audio_serve.sampling.terms import NOISE, register
from stable_audio_serve.sampling.v_network import VNetwork

_X, _AHEAD, _FIRST_SLOPE = register(0), register(1), register(2)


def heun(network: VNetwork, sigmas: Sequence[float]) -> None:
    """Heun's method (arXiv 2206.00364, algorithm 1 without churn): a step uses the mean of the slopes at both ends.

    Registers: x after half a step with the first slope, and x after an Euler step. The last step, to 0, is an Euler
    step.
    """
    for s, n in itertools.pairwise(sigmas):
        k = network.slope(s)
        if n == 0.0:
            network.evaluate(s, network.denoised(s))
        else:
            network.evaluate(s, _X + k * (0.5 * (n - s)), _X + k * (n - s))
            network.evaluate(n, _X + network.slope(n, input_register=1) * (0.5 * (n - s)), input_register=1)
        network.end_step()


def dpm_2(network: VNetwork, sigmas: Sequence[float]) -> None:
    """DPM-Solver-2 as in k-diffusion (arXiv 2206.00927): a step uses the slope at the geometric mean of its two levels.

    Registers: x at the first level, x at the mean. The last step, to 0, is an Euler step.
    """
    for s, n in itertools.pairwise(sigmas):
        if n == 0.0:
            network.evaluate(s, network.denoised(s))
        else:
            levels = torch.tensor([s, n], dtype=torch.float32).log()
            middle = float(levels[0].lerp(levels[1], 0.5).exp())
            network.evaluate(s, _X, _X + network.slope(s) * (middle - s))
            network.evaluate(middle, _X + network.slope(middle, input_register=1) * (n - s), input_register=1)
        network.end_step()


def dpmpp_2s_ancestral(network: VNetwork, sigmas: Sequence[float]) -> None:
    """Ancestral DPM-Solver++(2S) (arXiv 2211.01095): each step goes to a level below the next of `sigmas`. Fresh noise
    then raises x to the next of `sigmas`.

    Registers: x, and x at an intermediate level. The last step, to 0, is an Euler step without noise.
    """
    for s, n in itertools.pairwise(sigmas):
        down, up = _ancestral_levels(s, n)
        d = network.denoised(s)
        if down == 0.0:
            network.evaluate(s, d + NOISE * up if n > 0.0 else d)
        else:
            start, end = torch.tensor([s, down], dtype=torch.float32).log().neg()
            h = float(end - start)
            middle = float(_levels(start + 0.5 * (end - start)))
            network.evaluate(s, _X, _X * math.exp(-0.5 * h) - d * math.expm1(-0.5 * h))
            ahead = network.denoised(middle, input_register=1)
            network.evaluate(middle, _X * (down / s) - ahead * math.expm1(-h) + NOISE * up, input_register=1)
        network.end_step()


def _ancestral_levels(s: float, n: float) -> tuple[float, float]:
    """Return two levels for an ancestral step from level s to level n: the level below n that the step reaches, and the
    level of the noise that then raises it to n.

    Both are computed in float32. For a long step the first level is then exactly 0, because n**2 / s is much smaller
    than n.
    """
    start, end = torch.tensor([s, n], dtype=torch.float32)
    up = torch.minimum(end, (end**2 * (start**2 - end**2) / start**2) ** 0.5)
    return float((end**2 - up**2) ** 0.5), float(up)


def dpm_fast(network: VNetwork, steps: int, *, span: SigmaRange) -> None:
    """DPM-Solver-fast (arXiv 2206.00927) with `steps` network calls in total. Most of its solver steps have order 3,
    and each of these makes three calls.

    The last solver steps have a lower order, so that there are exactly `steps` calls. The sampler ends at the level
    `span.sigma_min`, not at 0. Three registers: x; x at the next intermediate level; the slope at the start of the
    solver step.
    """
    check_steps(steps)
    ends = torch.tensor([span.sigma_max, span.sigma_min], dtype=torch.float32).log().neg()
    num_pieces = steps // 3 + 1
    edges = torch.linspace(float(ends[0]), float(ends[1]), num_pieces + 1, dtype=torch.float32)
    if (edges.diff() == 0).any():
        message = f"sigma_min and sigma_max are too close to each other for {steps} steps of this sampler"
        raise InvalidRequestError(message, field="sigma_max")
    rest = [2, 1] if steps % 3 == 0 else [steps % 3]
    orders = [3] * (num_pieces - len(rest)) + rest
    for order, (start, end) in zip(orders, itertools.pairwise(edges), strict=True):
        _DPM_PIECES[order](network, start, end=end)


def _first_order(network: VNetwork, start: Tensor, *, end: Tensor) -> None:
    """Add a solver step of order 1. `start` and `end` are values of -ln sigma (0-dim float32)."""
    s, n = float(_levels(start)), float(_levels(end))
    network.evaluate(s, _X - network.slope(s) * (n * math.expm1(float(end - start))))
    network.end_step()


def _second_order(network: VNetwork, start: Tensor, *, end: Tensor) -> None:
    """Add a solver step of order 2, with evaluations at its start and its middle. `start` and `end` are -ln sigma."""
    h = float(end - start)
    s, middle, n = (float(_levels(time)) for time in (start, start + 0.5 * (end - start), end))
    first = network.slope(s)
    network.evaluate(s, _X, _X - first * (middle * math.expm1(0.5 * h)), first)
    network.end_step()
    second = network.slope(middle, input_register=1)
    growth = n * math.expm1(h)
    network.evaluate(middle, _X - _FIRST_SLOPE * growth - (second - _FIRST_SLOPE) * growth, input_register=1)
    network.end_step()


def _third_order(network: VNetwork, start: Tensor, *, end: Tensor) -> None:
    """Add a solver step of order 3, with evaluations at its start, one third and two thirds.

    `start` and `end` are values of -ln sigma.
    """
    h = float(end - start)
    times = (start, start + (end - start) * (1 / 3), start + (end - start) * (2 / 3), end)
    s, third, two_thirds, n = (float(_levels(time)) for time in times)
    first = network.slope(s)
    network.evaluate(s, _X, _X - first * (third * math.expm1(h / 3)), first)
    network.end_step()
    growth = math.expm1(2 * h / 3)
    bend = (network.slope(third, input_register=1) - _FIRST_SLOPE) * (2.0 * (growth / (2 * h / 3) - 1.0))
    network.evaluate(third, _X, _X - (_FIRST_SLOPE * growth + bend) * two_thirds, _FIRST_SLOPE, input_register=1)
    network.end_step()
    growth = math.expm1(h)
    bend = (network.slope(two_thirds, input_register=1) - _FIRST_SLOPE) * (1.5 * (growth / h - 1.0))
    network.evaluate(two_thirds, _X - (_FIRST_SLOPE * growth + bend) * n, input_register=1)
    network.end_step()


_DPM_PIECES = {1: _first_order, 2: _second_order, 3: _third_order}


def _levels(times: Tensor) -> Tensor:
    """Return the noise levels sigma = e^-time. The `times` of this solver are -ln sigma."""
    return times.neg().exp()
