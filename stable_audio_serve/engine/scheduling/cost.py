"""Predicts the time of device work from its rows and frames. Scheduling, admission, Retry-After, autoscaling and
routing all use this model. Independent of tensors and clocks: callers pass in measured times.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
import numpy.typing as npt

_NOISE = 0.02  # relative error of any timing; a term that explains less is dropped
_TERM_PRICE = 4.0  # Akaike's criterion uses 2; higher here, because a term that fits noise is wrong at large shapes
_FIXED, _PER_ROW, _PER_FRAME, _PER_SQUARE = range(4)

Array = npt.NDArray[np.float64]
Groups = tuple[tuple[int, int], ...]  # the rows of one call, as pairs (number of rows, latent frames of each)


@dataclass(frozen=True, slots=True)
class Measurement:
    """One timed device call over `rows` rows of `frames` latent frames each."""

    rows: int
    frames: int
    ms: float


@dataclass(frozen=True, slots=True)
class CallCost:
    """ms = max(floor, fixed + rows * (per_row + per_frame * frames + per_square * frames^2)), all at least 0.

    The floor is the least time that the host or the memory needs. Rows add no time until the sum exceeds it.
    """

    fixed_ms: float = 1.0
    per_row_ms: float = 0.0
    per_frame_ms: float = 0.05
    per_square_ms: float = 0.0
    floor_ms: float = 0.0

    def row_ms(self, frames: int) -> float:
        """Return the time that one more row of `frames` latent frames adds above the floor."""
        return self.per_row_ms + (self.per_frame_ms + self.per_square_ms * frames) * frames

    def call_ms(self, rows: int, frames: int) -> float:
        """Return the time of a call over `rows` rows padded to `frames` latent frames."""
        return max(self.floor_ms, self.fixed_ms + rows * self.row_ms(frames))

    def groups_ms(self, groups: Groups) -> float:
        """Return the time of a call over rows of several lengths, packed without padding."""
        return max(self.floor_ms, self.fixed_ms + sum(rows * self.row_ms(frames) for rows, frames in groups))

    def worthwhile_ms(self, overhead_share: float) -> float:
        """Return the time in ms that a call's rows must take for its overhead to fall to this share of the call."""
        return (1.0 - overhead_share) * max(self.fixed_ms / overhead_share, self.floor_ms)


def fit_call_cost(measurements: Iterable[Measurement]) -> CallCost:
    """Fit a cost by least squares on relative errors. No coefficient is negative, and the cost grows with the shape.

    If a larger call measured faster than a smaller one, another program disturbed the smaller one's measurement, which
    is then lowered to that of the larger one. A term is used only if it explains more than the noise. Raises ValueError
    without measurements.
    """
    points = _undisturbed(measurements)
    if not points:
        raise ValueError("a cost needs at least one measurement")
    features = np.array([(1.0, m.rows, m.rows * m.frames, m.rows * m.frames**2) for m in points])
    ms = np.array([m.ms for m in points])
    return min(_candidates(features, ms), key=lambda candidate: candidate[0])[1]


def _undisturbed(measurements: Iterable[Measurement]) -> list[Measurement]:
    """Return one measurement per shape, shortest first.

    Each time is the minimum over all calls with at least as many rows and frames, because a smaller call cannot be
    slower.
    """
    measured = [Measurement(m.rows, m.frames, max(m.ms, 1e-6)) for m in measurements]
    shapes = {(m.rows, m.frames) for m in measured}
    points = [
        Measurement(rows, frames, min(m.ms for m in measured if m.rows >= rows and m.frames >= frames))
        for rows, frames in shapes
    ]
    return sorted(points, key=lambda m: (m.ms, m.rows * m.frames, m.rows))


def _candidates(features: Array, ms: Array) -> Iterator[tuple[float, CallCost]]:
    """Yield (score, cost) for each number of shortest calls taken to be at the floor. A lower score is better."""
    growth = _PER_FRAME if features[:, _PER_FRAME].any() else _PER_ROW
    for num_flat in range(len(ms)):
        floor_ms = float(np.median(ms[:num_flat])) if num_flat else 0.0
        for terms in _terms(len(ms) - num_flat, growth=growth):
            coefficients = _solve(features[num_flat:][:, terms], ms[num_flat:])
            if coefficients is None:
                continue
            solution = np.zeros(4)
            solution[terms] = coefficients
            score = _score(features @ solution, ms, floor_ms=floor_ms, num_terms=len(terms) + (num_flat > 0))
            yield score, _cost(solution, floor_ms=floor_ms)
    # For times that do not grow with the shape: assume that they grow beyond the largest measured shape.
    flat_ms = float(np.median(ms))
    solution = np.zeros(4)
    solution[growth] = flat_ms / 2 / max(float(features[:, growth].max()), 1.0)
    solution[_FIXED] = flat_ms / 2
    yield (
        _score(features @ solution, ms, floor_ms=flat_ms, num_terms=1),
        _cost(solution, floor_ms=flat_ms),
    )


def _cost(coefficients: Array, *, floor_ms: float) -> CallCost:
    fixed, per_row, per_frame, per_square = (float(c) for c in coefficients)
    return CallCost(fixed, per_row, per_frame, per_square, floor_ms)


def _terms(num_points: int, *, growth: int) -> Iterator[list[int]]:
    """Yield the sets of terms that this many points can determine. Each set includes the term `growth`."""
    others = [_FIXED] if growth == _PER_ROW else [_FIXED, _PER_ROW, _PER_SQUARE]
    for count in range(min(len(others), num_points - 1) + 1):
        for some in combinations(others, count):
            yield sorted((growth, *some))


def _solve(features: Array, ms: Array) -> Array | None:
    """Return the coefficients with the least relative error; None if any is not positive."""
    columns = features / ms[:, None]
    norms = np.linalg.norm(columns, axis=0)
    if not norms.all():
        return None
    columns = columns / norms
    try:
        coefficients = np.linalg.solve(columns.T @ columns, columns.sum(axis=0)) / norms
    except np.linalg.LinAlgError:  # the measured shapes do not determine all of these terms
        return None
    return coefficients if (coefficients > 0).all() else None


def _score(above_ms: Array, ms: Array, *, floor_ms: float, num_terms: int) -> float:
    """Return Akaike's criterion with a higher price per term. `above_ms` is the formula without its floor."""
    errors = np.log(np.maximum(above_ms, floor_ms) / ms)
    return float(len(ms) * np.log(np.mean(errors**2) + _NOISE**2) + _TERM_PRICE * num_terms)


_MOST_TOKENS = 2.0**20  # the largest result of `CostModel.knee_tokens`, which it returns if rows cost nothing
_FIT_WEIGHT = 4  # a fit counts as much as this many corrections
_MAX_RATIO = 3.0  # largest factor by which one measurement may differ from its prediction

Work = Literal["text", "encode", "denoise", "decode"]


class CostModel:
    """One `CallCost` per kind of work, fitted at warm-up, and one scale per kind that follows measured times.

    The rows of a text call are prompts, with `frames` 0. Only the engine thread writes. Other threads may read, and
    each read sees coefficients that belong together.
    """

    def __init__(self, *, learning_rate: float = 0.05) -> None:
        """`learning_rate` is the weight of a new measurement against all earlier ones. The first few weigh more."""
        self._learning_rate = learning_rate
        self._costs: dict[Work, CallCost] = {
            "text": CallCost(fixed_ms=0.0, per_row_ms=5.0, per_frame_ms=0.0),
            "encode": CallCost(),
            "denoise": CallCost(),
            "decode": CallCost(),
        }
        self._scales: dict[Work, float] = dict.fromkeys(self._costs, 1.0)
        self._num_corrections: dict[Work, int] = dict.fromkeys(self._costs, 0)

    def fit(self, work: Work, measurements: Iterable[Measurement]) -> None:
        """Replace the coefficients of one kind of work."""
        self._costs[work] = fit_call_cost(measurements)
        self._scales[work] = 1.0
        self._num_corrections[work] = _FIT_WEIGHT

    def correct(self, work: Work, calls: Iterable[Groups], *, measured_ms: float) -> None:
        """Move the scale of `work` towards the total measured time of these calls.

        The first measurement of a kind without a fit sets the scale. Later measurements change it by a limited factor,
        because other programs may have disturbed them.
        """
        predicted_ms = sum(self._costs[work].groups_ms(groups) for groups in calls)
        if predicted_ms <= 0 or measured_ms <= 0:
            return
        ratio = measured_ms / (predicted_ms * self._scales[work])
        if self._num_corrections[work] > 0:
            ratio = min(max(ratio, 1.0 / _MAX_RATIO), _MAX_RATIO)
        self._num_corrections[work] += 1
        self._scales[work] *= ratio ** max(self._learning_rate, 1.0 / self._num_corrections[work])

    def call_ms(self, work: Work, *, rows: int, frames: int) -> float:
        """Return the predicted time of one call."""
        return self._scales[work] * self._costs[work].call_ms(rows, frames)

    def groups_ms(self, work: Work, groups: Groups) -> float:
        """Return the predicted time of one packed call over rows of several lengths."""
        return self._scales[work] * self._costs[work].groups_ms(groups)

    def knee_tokens(self, frames: int, fixed_share: float) -> float:
        """Return how many latent frames, in rows of `frames`, make overhead fall to `fixed_share` of a denoiser call.

        Overhead is the fixed time, or the part of the floor that the rows do not use.
        """
        cost = self._costs["denoise"]
        per_token_ms = cost.row_ms(frames) / max(frames, 1)
        if per_token_ms <= 0:
            return _MOST_TOKENS
        return min(cost.worthwhile_ms(fixed_share) / per_token_ms, _MOST_TOKENS)
