"""Predicts how long the work of a clip (row) takes, either alone or in denoising steps that it shares with many other
clips. For processes without an engine, summarises the predictions in a few coefficients (`Prices`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

from stable_audio_serve.core.generation import GenerationRequest
from stable_audio_serve.core.pricing import Prices
from stable_audio_serve.engine.scheduling.batching import BatchPolicy, Lane
from stable_audio_serve.engine.scheduling.cost import CostModel, Work
from stable_audio_serve.engine.scheduling.scheduler import Phase, RowWork
from stable_audio_serve.engine.scheduling.windows import num_in_turn
from stable_audio_serve.models.protocol import DiffusionModel

# `Prices` are computed from predictions for clips of two durations. These are given as fractions of the longest
# duration. The longest clip itself would be atypical, because its latents have no padding.
_SHORT, _LONG = 0.125, 0.75
_FEW_STEPS, _MANY_STEPS = 8, 16


class PriceList:
    """Computes `Prices` from the engine's current predictions. Thread-safe."""

    def __init__(self, model: DiffusionModel, predictor: Predictor) -> None:
        card = model.spec.card
        self._card = card
        self._model = model
        self._predictor = predictor
        self._seconds = (_SHORT * card.max_duration_s, _LONG * card.max_duration_s)

    @cached_property
    def _works(self) -> dict[tuple[float, int], RowWork]:
        return {
            (seconds, steps): _plan(self._model, seconds=seconds, steps=steps)
            for seconds in self._seconds
            for steps in (_FEW_STEPS, _MANY_STEPS)
        }

    def current(self) -> Prices:
        """Return coefficients that predict a clip's part of the device time when it shares its denoising steps with
        other clips.
        """
        ms = {shape: self._predictor.share_ms(work) for shape, work in self._works.items()}
        text_ms = self._predictor.text_ms(1)
        short_s, long_s = self._seconds
        evaluation = {s: (ms[s, _MANY_STEPS] - ms[s, _FEW_STEPS]) / (_MANY_STEPS - _FEW_STEPS) for s in self._seconds}
        others = {s: ms[s, _FEW_STEPS] - _FEW_STEPS * evaluation[s] for s in self._seconds}
        evaluation_ms, evaluated_second_ms = _line(short_s, evaluation[short_s], long_s, evaluation[long_s])
        row_ms, audio_second_ms = _line(short_s, others[short_s], long_s, others[long_s])
        return Prices(
            row_ms=text_ms + row_ms,
            evaluation_ms=evaluation_ms,
            evaluated_second_ms=evaluated_second_ms,
            audio_second_ms=audio_second_ms,
            default_steps=self._card.default_steps,
            default_cfg_scale=self._card.default_cfg_scale,
            adapted=self._predictor.adapted,
        )


def _plan(model: DiffusionModel, *, seconds: float, steps: int) -> RowWork:
    request = GenerationRequest(prompt="", duration_s=seconds, seed=0, steps=steps, cfg_scale=1.0)
    return RowWork.of(model.plan(request)[0], hop=model.spec.hop)


def _line(x0: float, y0: float, x1: float, y1: float) -> tuple[float, float]:  # noqa: PLR0917 - two points
    """Return the line through (x0, y0) and (x1, y1) as (value at x = 0, slope), both clamped to at least 0."""
    slope = max(0.0, (y1 - y0) / (x1 - x0))
    return max(0.0, y0 - slope * x0), slope


class Predictor:
    """Predicts the times of rows. Thread-safe.

    The scheduler uses the time of a row that runs alone. Admission and routing use the time of a row that shares full
    steps with other rows.
    """

    def __init__(self, cost: CostModel, policy: BatchPolicy) -> None:
        self._cost = cost
        self._policy = policy

    @property
    def adapted(self) -> float:
        """The time of an evaluation with adapters, relative to one without."""
        return self._cost.adapted

    def text_ms(self, num_prompts: int) -> float:
        """Return the time in ms to encode this many prompts in one call."""
        return self._cost.call_ms("text", rows=num_prompts, frames=0)

    def alone_ms(self, work: RowWork) -> float:
        """Return the row's remaining time in ms on an otherwise idle engine, including text encoding."""
        return self.text_ms(1) + self._left_ms(work, self._alone_evaluation_ms)

    def share_ms(self, work: RowWork) -> float:
        """Return the row's part, in ms, of the device time of its remaining steps if other rows share these steps."""
        return self._left_ms(work, self._shared_evaluation_ms)

    def step_ms(self, works: Sequence[RowWork], num_new: int) -> float:
        """Return the time in ms of one turn in which these rows run. `num_new` of them need their prompt encoded."""
        lanes = [work.lane for work in works if work.phase is Phase.DENOISE]
        total = self.text_ms(num_new) if num_new else 0.0
        factor = self._cost.adapted if any(work.is_adapted for work in works) else 1.0
        total += factor * sum(self._cost.groups_ms("denoise", call.groups) for call in self._policy.split(lanes))
        total += sum(self._coding_ms("encode", work.encode_left) for work in works if work.phase is Phase.ENCODE)
        total += sum(self._coding_ms("decode", work.decode_left) for work in works if work.phase is Phase.DECODE)
        return total

    def _left_ms(self, work: RowWork, evaluation_ms: Callable[[int, int], float]) -> float:
        """Return the time in ms of a row's remaining work, without text encoding.

        `evaluation_ms(branches, frames)` predicts the time of one evaluation.
        """
        total = sum(self._cost.call_ms("encode", rows=1, frames=frames) for frames in work.encode_left)
        total += sum(self._cost.call_ms("decode", rows=1, frames=frames) for frames in work.decode_left)
        single = len(work.branches) - work.num_done - work.guided_left
        factor = self._cost.adapted if work.is_adapted else 1.0
        if single:
            total += factor * single * evaluation_ms(1, work.frames)
        if work.guided_left:
            total += factor * work.guided_left * evaluation_ms(2, work.frames)
        return total

    def _coding_ms(self, kind: Work, lengths: Sequence[int]) -> float:
        """Return the time in ms to encode or decode (`kind`) the windows of one row in one turn of the engine's loop.

        `lengths` has the latent frames of each of the row's remaining windows.
        """
        return sum(self._cost.call_ms(kind, rows=1, frames=frames) for frames in lengths[: num_in_turn(lengths)])

    def _alone_evaluation_ms(self, branches: int, frames: int) -> float:
        calls = self._policy.split([Lane(branches, frames)])
        return sum(self._cost.groups_ms("denoise", call.groups) for call in calls)

    def _shared_evaluation_ms(self, branches: int, frames: int) -> float:
        padded = self._policy.padded(frames)
        rows = self._policy.typical_rows(branches, padded)
        return self._cost.call_ms("denoise", rows=rows, frames=padded) * branches / rows
