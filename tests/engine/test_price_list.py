"""Prices, by which processes without an engine predict a request's time, agree with the engine's cost model."""

from __future__ import annotations

import pytest

from stable_audio_serve.core.generation import GenerationRequest
from stable_audio_serve.engine.scheduling.batching import OneRowPerCall
from stable_audio_serve.engine.scheduling.cost import CostModel, Measurement
from stable_audio_serve.engine.scheduling.prediction import Predictor, PriceList
from stable_audio_serve.engine.scheduling.scheduler import RowWork
from tests.factories import ToyModel, make_request

MODEL = ToyModel()
CARD = MODEL.spec.card


@pytest.fixture
def cost() -> CostModel:
    """Returns a cost model in which a step of one row takes 3 ms plus 0.5 ms per latent frame (100 frames a second)."""
    cost = CostModel()
    cost.fit("text", [Measurement(rows, 0, 2.0 + 5.0 * rows) for rows in (1, 2, 4)])
    for work, fixed_ms, frame_ms in (("denoise", 3.0, 0.5), ("decode", 0.5, 0.25)):
        shapes = [(rows, frames) for rows in (1, 2, 4) for frames in (16, 64, 256)]
        cost.fit(work, [Measurement(rows, frames, fixed_ms + frame_ms * rows * frames) for rows, frames in shapes])
    return cost


def predict_ms(cost: CostModel, request: GenerationRequest) -> float:
    predictor = Predictor(cost, OneRowPerCall())
    works = [RowWork.of(plan, hop=MODEL.spec.hop) for plan in MODEL.plan(request)]
    return predictor.text_ms(len(works)) + sum(predictor.share_ms(work) for work in works)


def test_price_of_an_evaluation_includes_the_headroom(cost: CostModel) -> None:
    prices = PriceList(MODEL, Predictor(cost, OneRowPerCall())).current()
    # The model generates 0.1 s more than requested, and rounding up to an even length adds at most two frames.
    assert 0.0 <= prices.evaluation_ms - (3.0 + 0.5 * 100 * 0.1) <= 2 * 0.5 * 1.25
    assert prices.evaluated_second_ms == pytest.approx(0.5 * 100, rel=0.02)
    assert (prices.default_steps, prices.default_cfg_scale) == (CARD.default_steps, CARD.default_cfg_scale)


@pytest.mark.parametrize("duration_s", [0.1, 0.4, 1.3, 2.0, 2.56])
@pytest.mark.parametrize("fields", [{}, {"steps": 1}, {"steps": 100}, {"cfg_scale": 4.0}, {"batch_size": 3}])
def test_a_price_is_near_the_prediction(cost: CostModel, duration_s: float, fields: dict[str, object]) -> None:
    """The price and the prediction may differ by 25 %.

    For example, a guided step's two rows share a fixed cost, which the price counts twice.
    """
    prices = PriceList(MODEL, Predictor(cost, OneRowPerCall())).current()
    request = make_request(duration_s=duration_s, **fields)
    assert prices.of_request(request) == pytest.approx(predict_ms(cost, request), rel=0.25)


def test_prices_follow_measured_times(cost: CostModel) -> None:
    prices = PriceList(MODEL, Predictor(cost, OneRowPerCall()))
    before = prices.current()
    for _ in range(200):
        cost.correct("denoise", [((1, 64),)], measured_ms=2 * 35.0)
    after = prices.current()
    assert after.evaluation_ms == pytest.approx(2 * before.evaluation_ms, rel=0.01)
    assert after.audio_second_ms == pytest.approx(before.audio_second_ms)
