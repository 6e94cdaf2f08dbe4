"""Predicts how long rows take alone and as a share of full steps, from the cost model and the batch policy."""

from __future__ import annotations

from collections.abc import Sequence

from stable_audio_serve.engine.batching import BatchPolicy, Lane
from stable_audio_serve.engine.cost import CostModel, Work
from stable_audio_serve.engine.windows import count_fitting
from stable_audio_serve.engine.work import Phase, RowWork


class Predictor:
    """Predictions for scheduling (alone) and for admission and routing (share). Usable from any thread."""

    def __init__(self, cost: CostModel, policy: BatchPolicy, *, turn_frames: int = 1) -> None:
        """Each turn encodes or decodes `turn_frames` latent frames of a row, at least one window."""
        self._cost = cost
        self._policy = policy
        self._turn_frames = turn_frames

    def text_ms(self, num_prompts: int) -> float:
        """Returns the time of encoding so many new prompts at once."""
        return self._cost.call_ms("text", rows=num_prompts, frames=0)

    def alone_ms(self, work: RowWork) -> float:
        """Returns the row's remaining time on an otherwise idle engine, text included."""
        return self.text_ms(1) + work.predict_ms(self._cost, self._alone_evaluation_ms)

    def share_ms(self, work: RowWork) -> float:
        """Returns the row's remaining device time if it shares its steps with others."""
        return work.predict_ms(self._cost, self._shared_evaluation_ms)

    def step_ms(self, works: Sequence[RowWork], num_new: int) -> float:
        """Returns the time of one turn over rows, `num_new` of which are new and need their text encoded."""
        lanes = [work.lane for work in works if work.phase is Phase.DENOISE]
        total = self.text_ms(num_new) if num_new else 0.0
        total += sum(self._cost.groups_ms("denoise", call.groups) for call in self._policy.split(lanes))
        total += sum(self._coding_ms("encode", work.encode_left) for work in works if work.phase is Phase.ENCODE)
        total += sum(self._coding_ms("decode", work.decode_left) for work in works if work.phase is Phase.DECODE)
        return total

    def _coding_ms(self, kind: Work, lengths: Sequence[int]) -> float:
        """Returns the time of one row's next windows."""
        return sum(
            self._cost.call_ms(kind, rows=1, frames=frames)
            for frames in lengths[: count_fitting(lengths, self._turn_frames)]
        )

    def _alone_evaluation_ms(self, branches: int, frames: int) -> float:
        call = self._policy.split([Lane(branches, frames)])[0]
        return self._cost.call_ms("denoise", rows=call.rows, frames=call.frames)

    def _shared_evaluation_ms(self, branches: int, frames: int) -> float:
        padded = self._policy.padded(frames)
        crowd = self._policy.crowd(branches, padded)
        return self._cost.call_ms("denoise", rows=crowd, frames=padded) * branches / crowd
