"""The cost model: predicts the time of a device call from its batch size and its latent frames. Scheduling, admission,
the Retry-After header, autoscaling and routing all use its predictions. Callers pass measured times to the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
import numpy.typing as npt

_NOISE = 0.02  # relative error of measured times; a term of the formula that explains less than this is dropped
_TERM_PRICE = 4.0  # Akaike's criterion has 2. A term that fits noise mispredicts large shapes, so it must cost more.
_FIXED, _PER_ROW, _PER_FRAME, _PER_SQUARE = range(4)

Array = npt.NDArray[np.float64]
Groups = tuple[tuple[int, int], ...]  # the rows of one call, as pairs (number of rows, latent frames of each)


@dataclass(frozen=True, slots=True)
class Measurement:
    """The measured time of a device call with batch size `rows` and `frames` latent frames per row."""

    rows: int
    frames: int
    ms: float


@dataclass(frozen=True, slots=True)
class CallCost:
    """The coefficients, all at least 0, that predict the time of a call from its batch size `rows` and its `frames`:
    ms = max(floor, fixed + rows * (per_row + per_frame * frames + per_square * frames^2)).

    Even a small call takes the time `floor`, because the host must launch it and the device must read the weights.
    """

    fixed_ms: float = 1.0
    per_row_ms: float = 0.0
    per_frame_ms: float = 0.05
    per_square_ms: float = 0.0
    floor_ms: float = 0.0

    def row_ms(self, frames: int) -> float:
        """Return the time in ms that one more row of `frames` latent frames adds to a call longer than the floor."""
        return self.per_row_ms + (self.per_frame_ms + self.per_square_ms * frames) * frames

    def call_ms(self, rows: int, frames: int) -> float:
        """Return the time in ms of a call over `rows` rows, each padded to `frames` latent frames."""
        return max(self.floor_ms, self.fixed_ms + rows * self.row_ms(frames))

    def groups_ms(self, groups: Groups) -> float:
        """Return the time in ms of a packed call, whose rows have different lengths and no padding."""
        return max(self.floor_ms, self.fixed_ms + sum(rows * self.row_ms(frames) for rows, frames in groups))

    def worthwhile_ms(self, overhead_share: float) -> float:
        """Return how many ms the rows of a call must take, so that the rest of the call's time (the overhead) is only
        the fraction `overhead_share` of the call's time.
        """
        return (1.0 - overhead_share) * max(self.fixed_ms / overhead_share, self.floor_ms)


def fit_call_cost(measurements: Iterable[Measurement]) -> CallCost:
    """Fit the coefficients to measured times by least squares of relative errors. The prediction for a larger call is
    never less than the prediction for a smaller one.

    If a small call took longer than a larger one, another program must have slowed down the small call, which then
    counts with the time of the larger one. A term of the formula is used only if it explains more than the measurement
    noise. Raises ValueError if there are no measurements.
    """
    points = _undisturbed(measurements)
    if not points:
        raise ValueError("a cost needs at least one measurement")
    features = np.array([(1.0, m.rows, m.rows * m.frames, m.rows * m.frames**2) for m in points])
    ms = np.array([m.ms for m in points])
    return min(_candidates(features, ms), key=lambda candidate: candidate[0])[1]


def _undisturbed(measurements: Iterable[Measurement]) -> list[Measurement]:
    """Return one measurement per call shape, ordered by time.

    Its time is the least of all measured times of this shape and of shapes with at least as many rows and frames,
    because an undisturbed call is not slower than a larger one.
    """
    measured = [Measurement(m.rows, m.frames, max(m.ms, 1e-6)) for m in measurements]
    shapes = {(m.rows, m.frames) for m in measured}
    points = [
        Measurement(rows, frames, min(m.ms for m in measured if m.rows >= rows and m.frames >= frames))
        for rows, frames in shapes
    ]
    return sorted(points, key=lambda m: (m.ms, m.rows * m.frames, m.rows))


def _candidates(features: Array, ms: Array) -> Iterator[tuple[float, CallCost]]:
    """Yield possible fits as (score, cost). A lower score is better.

    The fits differ in the terms that they use, and in how many of the shortest calls are assumed to take the floor
    time.
    """
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
    # One more fit, for measured times that are all about equal: the time grows only beyond the largest measured shape.
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
    """Yield every set of terms that has at most `num_points` terms and includes the term `growth`."""
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
    except np.linalg.LinAlgError:  # there are too few different shapes to determine all of these terms
        return None
    return coefficients if (coefficients > 0).all() else None


def _score(above_ms: Array, ms: Array, *, floor_ms: float, num_terms: int) -> float:
    """Return Akaike's information criterion of a fit to the measured times `ms`. Each term costs `_TERM_PRICE`.

    `above_ms` has the fitted times before the floor is applied.
    """
    errors = np.log(np.maximum(above_ms, floor_ms) / ms)
    return float(len(ms) * np.log(np.mean(errors**2) + _NOISE**2) + _TERM_PRICE * num_terms)


_MOST_TOKENS = 2.0**20  # the largest result of `CostModel.knee_tokens`; also its result if rows take no time
_FIRST_ADAPTED = 1.2  # until a step with adapters is measured
# The weight (0..1) of a new measurement; all earlier ones together have the rest. The first few have equal weights.
_LEARNING_RATE = 0.05
_FIT_WEIGHT = 4  # the fit at warm-up weighs as much as this many later measurements
_MAX_RATIO = 3.0  # if a measured time differs from its prediction by a larger factor, it counts as this factor

Work = Literal["text", "encode", "denoise", "decode"]


class CostModel:
    """Predicts the times of all kinds of work.

    Each kind has a `CallCost` that is fitted at warm-up. Later measurements adjust a factor, the scale, by which the
    times of the CallCost are multiplied. For the text encoder, `rows` is the number of prompts and `frames` is 0.

    Only the engine thread may change the model. Other threads may read predictions at any time.
    """

    def __init__(self) -> None:
        self._costs: dict[Work, CallCost] = {
            "text": CallCost(fixed_ms=0.0, per_row_ms=5.0, per_frame_ms=0.0),
            "encode": CallCost(),
            "denoise": CallCost(),
            "decode": CallCost(),
        }
        self._scales: dict[Work, float] = dict.fromkeys(self._costs, 1.0)
        self._num_corrections: dict[Work, int] = dict.fromkeys(self._costs, 0)
        self.adapted = _FIRST_ADAPTED  # the time of a step whose rows have adapters, relative to one without

    def fit(self, work: Work, measurements: Iterable[Measurement]) -> None:
        """Fit the coefficients of one kind of work to these measurements, and reset its scale to 1."""
        self._costs[work] = fit_call_cost(measurements)
        self._scales[work] = 1.0
        self._num_corrections[work] = _FIT_WEIGHT

    def correct(self, work: Work, calls: Iterable[Groups], *, measured_ms: float, is_adapted: bool = False) -> None:
        """Adjust the scale of one kind of work to `measured_ms`, the total time of these calls.

        The first measurement of a kind without a fit determines the scale. Any other measurement changes the scale by a
        limited factor, because another program may have slowed the calls down.

        `is_adapted` says that adapters applied to the calls. In this case `self.adapted` is adjusted instead.
        """
        predicted_ms = sum(self._costs[work].groups_ms(groups) for groups in calls)
        if predicted_ms <= 0 or measured_ms <= 0:
            return
        ratio = measured_ms / (predicted_ms * self._scales[work])
        if is_adapted:
            self.adapted += _LEARNING_RATE * (min(max(ratio, 1.0), _MAX_RATIO) - self.adapted)
            return
        if self._num_corrections[work] > 0:
            ratio = min(max(ratio, 1.0 / _MAX_RATIO), _MAX_RATIO)
        self._num_corrections[work] += 1
        self._scales[work] *= ratio ** max(_LEARNING_RATE, 1.0 / self._num_corrections[work])

    def call_ms(self, work: Work, *, rows: int, frames: int) -> float:
        """Return the predicted time in ms of a call with batch size `rows` and `frames` latent frames per row."""
        return self._scales[work] * self._costs[work].call_ms(rows, frames)

    def groups_ms(self, work: Work, groups: Groups) -> float:
        """Return the predicted time in ms of a packed call, whose rows have different lengths."""
        return self._scales[work] * self._costs[work].groups_ms(groups)

    def knee_tokens(self, frames: int, fixed_share: float) -> float:
        """Return how many latent frames a denoiser call needs in total, so that its overhead is only `fixed_share` of
        its time.

        Each row of the call has `frames` latent frames. Overhead is the time of the call minus the time of its rows.
        """
        cost = self._costs["denoise"]
        per_token_ms = cost.row_ms(frames) / max(frames, 1)
        if per_token_ms <= 0:
            return _MOST_TOKENS
        return min(cost.worthwhile_ms(fixed_share) / per_token_ms, _MOST_TOKENS)
