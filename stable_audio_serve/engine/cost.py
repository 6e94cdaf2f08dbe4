"""Predicts how long device work takes from (rows, frames) alone. Scheduling, admission, Retry-After, autoscaling and
routing all read this one model. Knows no tensors and no clock: callers pass in measured times.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

_MOST_TOKENS = 2.0**20  # the answer where rows cost nothing

Work = Literal["text", "encode", "denoise", "decode"]


@dataclass(frozen=True, slots=True)
class Measurement:
    """One timed device call over `rows` rows of `frames` latent frames each."""

    rows: int
    frames: int
    ms: float


@dataclass(frozen=True, slots=True)
class CallCost:
    """ms = fixed + rows * (per_row + per_frame * frames + per_square * frames^2), every coefficient >= 0."""

    fixed_ms: float = 1.0
    per_row_ms: float = 0.0
    per_frame_ms: float = 0.05
    per_square_ms: float = 0.0

    def row_ms(self, frames: int) -> float:
        """Returns the time that one more row of `frames` latent frames adds to a call."""
        return self.per_row_ms + (self.per_frame_ms + self.per_square_ms * frames) * frames

    def call_ms(self, rows: int, frames: int) -> float:
        """Returns the time of a whole call over `rows` rows padded to `frames` latent frames."""
        return self.fixed_ms + rows * self.row_ms(frames)


def fit_call_cost(measurements: Sequence[Measurement]) -> CallCost:
    """Fit by least squares on relative errors; negative coefficients are set to 0, one at a time.

    With fewer measurements than coefficients the higher-order terms are 0. Raises ValueError without measurements.
    """
    if not measurements:
        raise ValueError("a cost needs at least one measurement")
    features = np.array([(1.0, m.rows, m.rows * m.frames, m.rows * m.frames**2) for m in measurements])
    ms = np.array([max(m.ms, 1e-6) for m in measurements])
    # With few points keep the terms that extrapolate best, in this order: per frame, fixed, per row, square.
    useful = [column for column in (2, 0, 1, 3) if features[:, column].any()]
    active = sorted(useful[: len(measurements)])
    solution = np.zeros(4)
    while active:
        columns = features[:, active] / ms[:, None]
        norms = np.linalg.norm(columns, axis=0)
        coefficients = np.linalg.lstsq(columns / norms, np.ones(len(ms)), rcond=None)[0] / norms
        if (coefficients >= 0).all():
            solution[active] = coefficients
            break
        active.pop(int(np.argmin(coefficients * norms)))
    fixed, per_row, per_frame, per_square = (float(c) for c in solution)
    return CallCost(fixed, per_row, per_frame, per_square)


class CostModel:
    """One `CallCost` per kind of work, fitted at warm-up, and one scale per kind that follows measured times.

    Only the engine thread writes. Other threads may read: each read sees a consistent set of coefficients.
    """

    def __init__(self, *, learning_rate: float = 0.05) -> None:
        """`learning_rate` is the weight of one measurement after many; the first ones weigh more."""
        self._learning_rate = learning_rate
        self._costs: dict[Work, CallCost] = {
            "text": CallCost(fixed_ms=5.0, per_frame_ms=0.0),
            "encode": CallCost(),
            "denoise": CallCost(),
            "decode": CallCost(),
        }
        self._scales: dict[Work, float] = dict.fromkeys(self._costs, 1.0)
        self._num_corrections: dict[Work, int] = dict.fromkeys(self._costs, 0)

    def fit(self, work: Work, measurements: Sequence[Measurement]) -> None:
        """Replace the coefficients of one kind of work."""
        self._costs[work] = fit_call_cost(measurements)
        self._scales[work] = 1.0
        self._num_corrections[work] = 4  # a fit counts as a few measurements

    def correct(self, work: Work, calls: Iterable[tuple[int, int]], *, measured_ms: float) -> None:
        """Move the scale of `work` towards the measured time of these (rows, frames) calls together."""
        predicted_ms = sum(self._costs[work].call_ms(rows, frames) for rows, frames in calls)
        if predicted_ms <= 0 or measured_ms <= 0:
            return
        self._num_corrections[work] += 1
        weight = max(self._learning_rate, 1 / self._num_corrections[work])
        self._scales[work] *= (measured_ms / (predicted_ms * self._scales[work])) ** weight

    def call_ms(self, work: Work, *, rows: int, frames: int) -> float:
        """Returns the predicted time of one call."""
        return self._scales[work] * self._costs[work].call_ms(rows, frames)

    def row_ms(self, work: Work, frames: int) -> float:
        """Returns the predicted time that one more row adds to a call."""
        return self._scales[work] * self._costs[work].row_ms(frames)

    def knee_tokens(self, frames: int, fixed_share: float) -> float:
        """Returns at how many latent frames, in rows of `frames`, a denoiser call is `fixed_share` fixed cost."""
        cost = self._costs["denoise"]
        per_token_ms = cost.row_ms(frames) / max(frames, 1)
        variable_ms = cost.fixed_ms * (1 - fixed_share) / fixed_share
        return min(variable_ms / per_token_ms, _MOST_TOKENS) if per_token_ms > 0 else _MOST_TOKENS
