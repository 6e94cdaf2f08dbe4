"""Predicts how long device work takes from (rows, frames) alone. Scheduling, admission, Retry-After, autoscaling and
routing all read this one model. Knows no tensors and no clock: callers pass in measured times.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from stable_audio_serve.engine.call_cost import CallCost, Groups, Measurement, fit_call_cost

_MOST_TOKENS = 2.0**20  # the answer where rows cost nothing
_FIT_WEIGHT = 4  # a fit counts as so many measurements
_MOST_SURPRISE = 3.0  # times longer or shorter than predicted that one measurement may claim

Work = Literal["text", "encode", "denoise", "decode"]


class CostModel:
    """One `CallCost` per kind of work, fitted at warm-up, and one scale per kind that follows measured times.

    The rows of a text call are prompts and have no frames.
    Only the engine thread writes. Other threads may read: each read sees a consistent set of coefficients.
    """

    def __init__(self, *, learning_rate: float = 0.05) -> None:
        """`learning_rate` is the weight of one measurement after many; the first ones weigh more."""
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
        """Move the scale of `work` towards the measured time of these calls together.

        The first measurement of a kind that was not fitted is believed; later ones, which may have been disturbed by
        another program, move the scale by a bounded factor.
        """
        predicted_ms = sum(self._costs[work].groups_ms(groups) for groups in calls)
        if predicted_ms <= 0 or measured_ms <= 0:
            return
        surprise = measured_ms / (predicted_ms * self._scales[work])
        if self._num_corrections[work] > 0:
            surprise = min(max(surprise, 1.0 / _MOST_SURPRISE), _MOST_SURPRISE)
        self._num_corrections[work] += 1
        self._scales[work] *= surprise ** max(self._learning_rate, 1.0 / self._num_corrections[work])

    def call_ms(self, work: Work, *, rows: int, frames: int) -> float:
        """Returns the predicted time of one call."""
        return self._scales[work] * self._costs[work].call_ms(rows, frames)

    def groups_ms(self, work: Work, groups: Groups) -> float:
        """Returns the predicted time of one call of rows of several lengths."""
        return self._scales[work] * self._costs[work].groups_ms(groups)

    def knee_tokens(self, frames: int, fixed_share: float) -> float:
        """Returns at how many latent frames, in rows of `frames`, a denoiser call is `fixed_share` overhead: its
        fixed time, or the time below the floor that its rows do not use."""
        cost = self._costs["denoise"]
        per_token_ms = cost.row_ms(frames) / max(frames, 1)
        if per_token_ms <= 0:
            return _MOST_TOKENS
        return min(cost.worthwhile_ms(fixed_share) / per_token_ms, _MOST_TOKENS)
