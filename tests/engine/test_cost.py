"""The cost model fits its measurements and follows changes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stable_audio_serve.engine.batching import MergedGrid, OneRowPerCall
from stable_audio_serve.engine.cost import CallCost, CostModel, Measurement, fit_call_cost
from stable_audio_serve.engine.prediction import Predictor
from stable_audio_serve.engine.work import RowWork

SHAPES = [(1, 64), (2, 64), (1, 256), (4, 256), (1, 1024), (2, 1024), (4, 1024)]
coefficient = st.floats(0, 10)


def measure(cost: CallCost, shapes: list[tuple[int, int]] = SHAPES) -> list[Measurement]:
    return [Measurement(rows, frames, cost.call_ms(rows, frames)) for rows, frames in shapes]


def test_fit_recovers_exact_coefficients() -> None:
    truth = CallCost(fixed_ms=1.4, per_row_ms=0.3, per_frame_ms=0.01, per_square_ms=1e-6)
    fitted = fit_call_cost(measure(truth))
    assert fitted.call_ms(8, 2048) == pytest.approx(truth.call_ms(8, 2048), rel=1e-6)


@given(st.lists(st.tuples(st.integers(1, 16), st.integers(0, 4096), st.floats(0.001, 1e5)), min_size=1, max_size=8))
def test_fit_never_predicts_negative_time(samples: list[tuple[int, int, float]]) -> None:
    fitted = fit_call_cost([Measurement(*sample) for sample in samples])
    assert min(fitted.fixed_ms, fitted.per_row_ms, fitted.per_frame_ms, fitted.per_square_ms) >= 0


def test_one_measurement_is_taken_as_proportional() -> None:
    fitted = fit_call_cost([Measurement(1, 100, 5.0)])
    assert fitted.call_ms(1, 200) == pytest.approx(10.0)


def test_scale_follows_a_slower_device() -> None:
    cost = CostModel()
    cost.fit("denoise", measure(CallCost(1.0, 0.0, 0.01)))
    before = cost.call_ms("denoise", rows=1, frames=500)
    for _ in range(200):
        cost.correct("denoise", [(1, 500)], measured_ms=2.0 * before)
    assert cost.call_ms("denoise", rows=1, frames=500) == pytest.approx(2.0 * before, rel=0.01)


def test_first_measurement_of_an_unfitted_kind_is_believed() -> None:
    cost = CostModel()
    cost.correct("decode", [(1, 100)], measured_ms=500.0)
    assert cost.call_ms("decode", rows=1, frames=100) == pytest.approx(500.0)


def test_knee_is_where_the_fixed_cost_is_its_share() -> None:
    cost = CostModel()
    cost.fit("denoise", measure(CallCost(2.0, 0.0, 0.01)))
    tokens = cost.knee_tokens(100, 0.15)
    assert 2.0 / cost.call_ms("denoise", rows=1, frames=int(tokens)) == pytest.approx(0.15, rel=0.01)


def test_free_rows_have_a_finite_knee() -> None:
    cost = CostModel()
    cost.fit("denoise", [Measurement(1, 64, 1.0), Measurement(8, 640, 1.0), Measurement(16, 1280, 1.0)])
    policy = MergedGrid(call_ms=lambda rows, frames: 1.0, knee_tokens=lambda frames: cost.knee_tokens(frames, 0.15))
    assert policy.crowd(1, 64) >= 1


def make_predictor(cost: CallCost, *, shared: bool) -> Predictor:
    model = CostModel()
    model.fit("denoise", measure(cost))
    if not shared:
        return Predictor(model, OneRowPerCall())
    return Predictor(
        model,
        MergedGrid(
            call_ms=lambda rows, frames: model.call_ms("denoise", rows=rows, frames=frames),
            knee_tokens=lambda frames: model.knee_tokens(frames, 0.15),
        ),
    )


def test_guided_steps_cost_two_rows_and_done_steps_nothing() -> None:
    predictor = make_predictor(CallCost(0.0, 0.0, 0.01), shared=False)
    work = RowWork(100, branches=[2, 2, 1, 1])
    assert predictor.share_ms(work) == pytest.approx(6.0)
    work.finish_evaluation()
    assert predictor.share_ms(work) == pytest.approx(4.0)


def test_crowded_share_is_less_than_alone_when_the_fixed_cost_is_large() -> None:
    work = RowWork(64, branches=[1] * 8)
    predictor = make_predictor(CallCost(10.0, 0.0, 0.01), shared=True)
    assert predictor.share_ms(work) < 0.2 * predictor.alone_ms(work)
