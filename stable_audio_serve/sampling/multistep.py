"""Samplers over noise levels sigma that call the network once per step and reuse results of earlier steps, which they
keep in registers.

In the formulas a step goes from level s to level n; d is the clean estimate D(x, s), and h = ln s - ln n. Each function
adds the steps between all adjacent `sigmas`, which descend to 0, to a plan. Levels are float32 values.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from stable_audio_serve.sampling.terms import NOISE, Terms, register
from stable_audio_serve.sampling.v_network import VNetwork

LMS_ORDER = 4

_X = register(0)


def dpmpp_2m(network: VNetwork, sigmas: Sequence[float]) -> None:
    """DPM-Solver++(2M), arXiv 2211.01095. A step from sigma s to n sets x to (n/s) x + (1 - e^-h) d', h = ln s - ln n.

    d' is extrapolated from the clean estimates of the previous step and of this step. Registers: x and the clean
    estimate of the previous step.
    """
    earlier: float | None = None
    for s, n in itertools.pairwise(sigmas):
        d = network.denoised(s)
        if n == 0.0:
            network.evaluate(s, d)
        else:
            h = math.log(s / n)
            extrapolated = d if earlier is None else d + (d - register(1)) * (h / (2.0 * earlier))
            network.evaluate(s, _X * (n / s) - extrapolated * math.expm1(-h), d)
            earlier = h
        network.end_step()


def dpmpp_2m_sde(network: VNetwork, sigmas: Sequence[float]) -> None:
    """The stochastic form of DPM-Solver++(2M) (arXiv 2211.01095, midpoint variant): each step adds fresh noise, except
    the last.

    Registers: x and the clean estimate of the previous step.
    """
    earlier: float | None = None
    for s, n in itertools.pairwise(sigmas):
        d = network.denoised(s)
        if n == 0.0:
            network.evaluate(s, d)
        else:
            h = math.log(s / n)
            fresh = -math.expm1(-2.0 * h)
            moved = _X * math.exp(-2.0 * h) + d * fresh + NOISE * (n * math.sqrt(fresh))
            if earlier is not None:
                moved = moved + (d - register(1)) * (0.5 * fresh * h / earlier)
            network.evaluate(s, moved, d)
            earlier = h
        network.end_step()


def dpmpp_3m_sde(network: VNetwork, sigmas: Sequence[float]) -> None:
    """The stochastic form of DPM-Solver++(3M), as in k-diffusion: each step adds fresh noise, except the last. It has
    order 3, because it uses the clean estimates of the two previous steps.

    Registers: x and the clean estimates of the previous step and of the step before it.
    """
    earlier: list[float] = []  # h = ln s - ln n of the previous steps, the latest first
    for s, n in itertools.pairwise(sigmas):
        d = network.denoised(s)
        if n == 0.0:
            network.evaluate(s, d)
        else:
            h = math.log(s / n)
            fresh = -math.expm1(-2.0 * h)
            moved = _X * math.exp(-2.0 * h) + d * fresh + NOISE * (n * math.sqrt(fresh))
            network.evaluate(s, moved + _third_order(d, h, earlier=earlier), d, register(1))
            earlier = [h, *earlier[:1]]
        network.end_step()


def _third_order(d: Terms, h: float, *, earlier: Sequence[float]) -> Terms:
    """Return the correction of a `dpmpp_3m_sde` step, computed from earlier clean estimates. `d` is the current clean
    estimate, `h` is the step's length in ln sigma, and `earlier` are the lengths of the previous steps.
    """
    if not earlier:
        return Terms({})
    phi_2 = math.expm1(-2.0 * h) / (2.0 * h) + 1.0
    r_0 = earlier[0] / h
    first = (d - register(1)) / r_0
    if len(earlier) == 1:
        return first * phi_2
    r_1 = earlier[1] / h
    second = (register(1) - register(2)) / r_1
    phi_3 = phi_2 / (2.0 * h) - 0.5
    bend = (first - second) / (r_0 + r_1)
    return (first + bend * r_0) * phi_2 - bend * phi_3


def lms(network: VNetwork, sigmas: Sequence[float]) -> None:
    """Katherine Crowson's k-lms: the Adams-Bashforth method of order up to 4, for levels with uneven distances.

    Registers: x, then the slopes dx/dsigma of the three previous steps, the latest first.
    """
    earlier = [register(index) for index in range(1, LMS_ORDER)]
    for step, (s, n) in enumerate(itertools.pairwise(sigmas)):
        order = min(step + 1, LMS_ORDER)
        slopes = [network.slope(s), *earlier[: order - 1]]
        weights = _adams_weights([sigmas[step - back] for back in range(order)], n)
        change = sum((slope * weight for slope, weight in zip(slopes, weights, strict=True)), Terms({}))
        network.evaluate(s, _X + change, slopes[0], *earlier[:-1])
        network.end_step()


def _adams_weights(nodes: Sequence[float], end: float) -> list[float]:
    """Return the integrals from `nodes[0]` to `end` of the Lagrange basis polynomials of `nodes`.

    Gauss quadrature with two points is exact here: with at most four nodes, the polynomials have degree 3 at most.
    """
    middle, half = (nodes[0] + end) / 2.0, (end - nodes[0]) / 2.0
    points = [middle - half / math.sqrt(3.0), middle + half / math.sqrt(3.0)]
    return [half * sum(_lagrange(nodes, index, at=point) for point in points) for index in range(len(nodes))]


def _lagrange(nodes: Sequence[float], index: int, *, at: float) -> float:
    others = (node for position, node in enumerate(nodes) if position != index)
    return math.prod((at - other) / (nodes[index] - other) for other in others)
