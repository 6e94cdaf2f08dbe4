"""What work costs on an engine, in the few numbers that a router or a job queue needs. Knows no queue."""

from __future__ import annotations

from functools import cached_property

from stable_audio_serve.core.generation import GenerationRequest
from stable_audio_serve.core.pricing import Prices
from stable_audio_serve.engine.prediction import Predictor
from stable_audio_serve.engine.rows import row_work
from stable_audio_serve.engine.work import RowWork
from stable_audio_serve.models.protocol import DiffusionModel

# Shares of the longest clip between which the prices are near: the longest has no room for the headroom behind it.
_SHORT, _LONG = 0.125, 0.75
_FEW_STEPS, _MANY_STEPS = 8, 16


class PriceList:
    """Prices that follow the engine's predictions. Usable from any thread."""

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
        """Returns what work costs now, if it shares its calls with other work."""
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
        )


def _plan(model: DiffusionModel, *, seconds: float, steps: int) -> RowWork:
    request = GenerationRequest(prompt="", duration_s=seconds, seed=0, steps=steps, cfg_scale=1.0)
    return row_work(model.plan(request)[0], hop=model.spec.hop)


def _line(x0: float, y0: float, x1: float, y1: float) -> tuple[float, float]:  # noqa: PLR0917 - two points
    """Returns (value at 0, slope) of the line through two points, both at least 0."""
    slope = max(0.0, (y1 - y0) / (x1 - x0))
    return max(0.0, y0 - slope * x0), slope
