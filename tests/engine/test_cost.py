"""The cost model, which predicts the time of calls: its fit to measurements, and its correction by later calls."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stable_audio_serve.engine.scheduling.batching import (
    PACKED_ROWS,
    AnyRows,
    GraphShapes,
    MergedGrid,
    OneRowPerCall,
    PackedGraphs,
)
from stable_audio_serve.engine.scheduling.cost import CallCost, CostModel, Measurement, fit_call_cost
from stable_audio_serve.engine.scheduling.prediction import Predictor
from stable_audio_serve.engine.scheduling.scheduler import RowWork

SHAPES = [(1, 64), (2, 64), (1, 256), (4, 256), (1, 1024), (2, 1024), (4, 1024)]


def measure(cost: CallCost, shapes: list[tuple[int, int]] = SHAPES) -> list[Measurement]:
    return [Measurement(rows, frames, cost.call_ms(rows, frames)) for rows, frames in shapes]


PROBES = st.sampled_from(
    [
        [(rows, frames) for frames in lengths for rows in (1, 2, 4, 8, 32) if rows * frames <= 16_384]
        for lengths in ((20, 80, 322, 1292), (64, 260, 1024, 4096), (10, 22, 64, 512))
    ]
)
curves = st.builds(
    CallCost,
    fixed_ms=st.floats(0.1, 12),
    per_row_ms=st.just(0.0) | st.floats(0, 2),
    per_frame_ms=st.floats(-3, -1).map(lambda power: 10**power),
    per_square_ms=st.just(0.0) | st.floats(-8, -5).map(lambda power: 10**power),
    floor_ms=st.just(0.0) | st.floats(0, 20),
)


def disturbed(truth_ms: float, rng: random.Random) -> float:
    """Returns a simulated measurement: the fastest of three runs. Other programs may slow down two of the runs."""
    runs = [truth_ms * rng.uniform(1.0, 1.05) * rng.choice([1.0, rng.uniform(1.0, 20.0)]) for _ in range(2)]
    return min(*runs, truth_ms * rng.uniform(1.0, 1.05))


@given(truth=curves, shapes=PROBES, seed=st.integers(0, 10_000))
def test_fit_on_a_disturbed_machine_is_near_the_true_cost(
    truth: CallCost, shapes: list[tuple[int, int]], seed: int
) -> None:
    """The fit is within 25 % of the true cost at each measured shape.

    If the true cost grows with the work, the fit at twice the rows or frames is also within a factor of two of the
    true cost.
    """
    rng = random.Random(seed)
    fitted = fit_call_cost([Measurement(*shape, disturbed(truth.call_ms(*shape), rng)) for shape in shapes])
    for shape in shapes:
        assert fitted.call_ms(*shape) == pytest.approx(truth.call_ms(*shape), rel=0.25)
    largest = max(shapes, key=lambda shape: shape[0] * shape[1])
    if truth.call_ms(*largest) > 1.5 * max(truth.floor_ms, truth.fixed_ms):
        for rows, frames in [(2 * rows, frames) for rows, frames in shapes] + [(1, 2 * shapes[-1][1])]:
            assert 0.5 <= fitted.call_ms(rows, frames) / truth.call_ms(rows, frames) <= 2.0


measured = st.lists(
    st.builds(Measurement, rows=st.integers(1, 16), frames=st.integers(1, 4096), ms=st.floats(0.001, 1e5)),
    min_size=1,
    max_size=12,
)


@given(measured)
def test_more_work_never_costs_less_after_any_fit(measurements: list[Measurement]) -> None:
    fitted = fit_call_cost(measurements)
    assert min(fitted.fixed_ms, fitted.per_row_ms, fitted.per_square_ms, fitted.floor_ms) >= 0
    assert fitted.per_frame_ms > 0  # with 0, short and long requests would get the same deadline
    for rows, frames in SHAPES:
        assert fitted.call_ms(rows, frames) <= fitted.call_ms(rows + 1, frames)
        assert fitted.call_ms(rows, frames) <= fitted.call_ms(rows, frames + 64)
    most_rows, largest = max(m.rows for m in measurements), max(m.rows * m.frames for m in measurements)
    for rows, frames in SHAPES:  # with many more rows than were measured, the predicted cost is higher
        more_rows = rows + 16 * max(most_rows, largest // frames)
        assert fitted.call_ms(more_rows, frames) > fitted.call_ms(rows, frames)


def test_fit_of_exact_times_finds_floor_and_slope() -> None:
    truth = CallCost(fixed_ms=1.4, per_row_ms=0.3, per_frame_ms=0.01, per_square_ms=1e-5, floor_ms=4.0)
    fitted = fit_call_cost(measure(truth))
    assert fitted.call_ms(8, 2048) == pytest.approx(truth.call_ms(8, 2048), rel=0.05)
    assert fitted.call_ms(1, 8) == pytest.approx(4.0)


def test_a_timing_above_a_larger_calls_timing_is_corrected() -> None:
    truth = CallCost(fixed_ms=2.0, per_frame_ms=0.01)
    spiked = [replace(m, ms=50.0) if (m.rows, m.frames) == (2, 64) else m for m in measure(truth)]
    assert fit_call_cost(spiked).call_ms(1, 64) == pytest.approx(truth.call_ms(1, 64), rel=0.1)


def test_predicted_cost_grows_beyond_the_measured_shapes() -> None:
    fitted = fit_call_cost([Measurement(rows, frames, 12.0) for rows, frames in SHAPES])
    assert all(fitted.call_ms(rows, frames) == pytest.approx(12.0) for rows, frames in SHAPES)
    assert 12.0 < fitted.call_ms(8, 1024) < 24.0


def test_each_prompt_has_a_cost() -> None:
    cost = CostModel()
    cost.fit("text", [Measurement(count, 0, 3.0 + 0.5 * count) for count in (1, 2, 4, 8)])
    assert cost.call_ms("text", rows=6, frames=0) == pytest.approx(6.0)


def test_a_single_measurement_scales_proportionally() -> None:
    fitted = fit_call_cost([Measurement(1, 100, 5.0)])
    assert fitted.call_ms(1, 200) == pytest.approx(10.0)


def test_scale_follows_a_slower_device() -> None:
    cost = CostModel()
    cost.fit("denoise", measure(CallCost(1.0, 0.0, 0.01)))
    before = cost.call_ms("denoise", rows=1, frames=500)
    for _ in range(200):
        cost.correct("denoise", [((1, 500),)], measured_ms=2.0 * before)
    assert cost.call_ms("denoise", rows=1, frames=500) == pytest.approx(2.0 * before, rel=0.01)


def test_first_measurement_of_an_unfitted_kind_sets_the_scale() -> None:
    cost = CostModel()
    cost.correct("decode", [((1, 100),)], measured_ms=500.0)
    assert cost.call_ms("decode", rows=1, frames=100) == pytest.approx(500.0)


@given(st.lists(st.floats(0.1, 1000.0), min_size=1, max_size=20))
def test_a_few_disturbed_calls_do_not_change_the_order_of_work(disturbances: list[float]) -> None:
    """Up to 20 calls take up to 1,000 times as long. Each changes the prediction by less than a third.

    After 60 undisturbed calls, the prediction is near its old value again.
    """
    cost = CostModel()
    cost.fit("denoise", measure(CallCost(1.0, 0.0, 0.01)))
    before = cost.call_ms("denoise", rows=1, frames=500)
    for factor in disturbances:
        last = cost.call_ms("denoise", rows=1, frames=500)
        cost.correct("denoise", [((1, 500),)], measured_ms=factor * before)
        assert 0.75 < cost.call_ms("denoise", rows=1, frames=500) / last < 1.3
    for _ in range(60):
        cost.correct("denoise", [((1, 500),)], measured_ms=before)
    assert cost.call_ms("denoise", rows=1, frames=500) == pytest.approx(before, rel=0.5)


def test_knee_is_where_the_fixed_cost_falls_to_its_share() -> None:
    cost = CostModel()
    cost.fit("denoise", measure(CallCost(2.0, 0.0, 0.01)))
    tokens = cost.knee_tokens(100, 0.15)
    assert 2.0 / cost.call_ms("denoise", rows=1, frames=int(tokens)) == pytest.approx(0.15, rel=0.01)


def test_knee_of_a_floor_is_where_its_unused_part_falls_to_its_share() -> None:
    cost = CostModel()
    cost.fit("denoise", measure(CallCost(0.1, 0.0, 0.01, floor_ms=12.0)))
    assert cost.knee_tokens(100, 0.15) == pytest.approx(0.85 * 12.0 / 0.01, rel=0.02)


def test_free_rows_have_a_finite_knee() -> None:
    cost = CostModel()
    cost.fit("denoise", [Measurement(1, 64, 1.0), Measurement(8, 640, 1.0), Measurement(16, 1280, 1.0)])

    def knee_tokens(frames: int) -> float:
        return cost.knee_tokens(frames, 0.15)

    for shapes in (AnyRows(), GraphShapes()):
        policy = MergedGrid(lambda rows, frames: 1.0, knee_tokens, shapes)
        assert 1 <= policy.typical_rows(1, 64) <= 16_384 / 64
    assert 1 <= PackedGraphs(knee_tokens, 64, 1292).typical_rows(1, 64) <= PACKED_ROWS[-1]


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
            shapes=GraphShapes(),
        ),
    )


def test_guided_steps_cost_two_rows_and_finished_steps_nothing() -> None:
    predictor = make_predictor(CallCost(0.0, 0.0, 0.01), shared=False)
    work = RowWork(100, branches=[2, 2, 1, 1])
    assert predictor.share_ms(work) == pytest.approx(6.0)
    work.finish_evaluation()
    assert predictor.share_ms(work) == pytest.approx(4.0)


def test_crowded_share_is_less_than_alone_when_the_fixed_cost_is_large() -> None:
    work = RowWork(64, branches=[1] * 8)
    predictor = make_predictor(CallCost(10.0, 0.0, 0.01), shared=True)
    assert predictor.share_ms(work) < 0.2 * predictor.alone_ms(work)


@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize("frames", [54, 323, 1292])
def test_a_packed_row_alone_costs_its_own_tokens_and_the_spare_ones(branches: int, frames: int) -> None:
    cost = CallCost(fixed_ms=1.0, per_frame_ms=0.004)
    model = CostModel()
    model.fit("denoise", measure(cost))
    predictor = Predictor(model, PackedGraphs(lambda frames: 1.0, 64, 1292))
    predicted_ms = predictor.alone_ms(RowWork(frames, branches=[branches])) - predictor.text_ms(1)
    own_ms = cost.call_ms(branches, frames)
    assert own_ms <= predicted_ms <= own_ms + 0.004 * (64 + branches * frames / 4)
