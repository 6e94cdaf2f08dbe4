"""Predicts how long rows take alone and what they weigh in a crowd: the cost model seen through the batch policy."""

from __future__ import annotations

from stable_audio_serve.engine.batching import BatchPolicy, Lane
from stable_audio_serve.engine.cost import CostModel
from stable_audio_serve.engine.work import RowWork


class Predictor:
    """Answers for scheduling (alone) and for admission and routing (share). Any thread may ask."""

    def __init__(self, cost: CostModel, policy: BatchPolicy) -> None:
        self._cost = cost
        self._policy = policy

    def alone_ms(self, work: RowWork) -> float:
        """Time the row needs from here on an otherwise idle engine, text included."""
        return self._cost.call_ms("text", 1, 0) + work.predict_ms(self._cost, self._alone_evaluation_ms)

    def share_ms(self, work: RowWork) -> float:
        """Device time the row takes from here when its steps are shared with others."""
        return work.predict_ms(self._cost, self._shared_evaluation_ms)

    def _alone_evaluation_ms(self, branches: int, frames: int) -> float:
        call = self._policy.split([Lane(branches, frames)])[0]
        return self._cost.call_ms("denoise", call.rows, call.frames)

    def _shared_evaluation_ms(self, branches: int, frames: int) -> float:
        padded = self._policy.padded(frames)
        crowd = self._policy.crowd(branches, padded)
        return self._cost.call_ms("denoise", crowd, padded) * branches / crowd
