from __future__ import annotations

import pytest

from stable_audio_serve.core.catalog import ModelCard
from stable_audio_serve.core.generation import Priority
from stable_audio_serve.jobs.runner.capacity import Capacity, work_of
from tests.factories import FakeClock, make_request

_AHEAD_S, _BATCH_AHEAD_S = 30.0, 5.0


def make_capacity(clock: FakeClock, *models: str, max_running: int = 64) -> Capacity:
    ahead_s: dict[Priority, float] = {"interactive": _AHEAD_S, "batch": _BATCH_AHEAD_S}
    return Capacity(models or ("a",), ahead_s=ahead_s, max_running=max_running, clock=clock)


def run_alone(capacity: Capacity, clock: FakeClock, *, work: float, seconds: float, model: str = "a") -> None:
    """A job from start to end, with nothing beside it."""
    capacity.begin("alone", model=model, priority="interactive", work=work)
    capacity.advance("alone", done=0.0)
    clock.now += seconds
    capacity.advance("alone", done=1.0)
    capacity.end("alone")


def fill(capacity: Capacity, *, work: float, model: str = "a", priority: Priority = "interactive") -> int:
    """How many such jobs are taken."""
    count = 0
    while (models := capacity.open_models(priority)) is None or model in models:
        capacity.begin((model, capacity.num_running), model=model, priority=priority, work=work)
        count += 1
    return count


def test_work_is_duration_times_the_network_s_calls() -> None:
    card = ModelCard("a", "f", default_steps=100, default_cfg_scale=7.0)
    assert work_of(make_request(duration_s=3.0, steps=8, batch_size=2, cfg_scale=1.0), card) == 48
    assert work_of(make_request(duration_s=3.0, steps=8, cfg_scale=1.0, sampler="k-heun"), card) == 48
    assert work_of(make_request(duration_s=3.0, steps=None), card) == 600


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def test_before_anything_is_learnt_a_few_jobs_go_to_each_replica(clock: FakeClock) -> None:
    capacity = make_capacity(clock)
    assert capacity.predict_s("a", 1.0) is None
    assert fill(capacity, work=1e9) == 4
    more = make_capacity(clock)
    more.set_replicas({"a": 3})
    assert fill(more, work=1e9) == 12


def test_a_model_takes_jobs_up_to_its_time_and_one_at_least(clock: FakeClock) -> None:
    capacity = make_capacity(clock)
    run_alone(capacity, clock, work=10.0, seconds=5.0)
    assert capacity.predict_s("a", 10.0) == pytest.approx(5.0)
    assert fill(capacity, work=10.0) == 6
    for index in range(6):
        capacity.end(("a", index))
    assert fill(capacity, work=1e6) == 1


def test_replicas_multiply_the_room(clock: FakeClock) -> None:
    capacity = make_capacity(clock)
    run_alone(capacity, clock, work=10.0, seconds=5.0)
    capacity.set_replicas({"a": 3})
    assert fill(capacity, work=10.0) == 18


def test_a_model_without_replicas_is_asked_all_the_same(clock: FakeClock) -> None:
    capacity = make_capacity(clock)
    run_alone(capacity, clock, work=10.0, seconds=5.0)
    capacity.set_replicas({"a": 0})
    assert fill(capacity, work=10.0) == 6


def test_a_full_model_leaves_room_for_another(clock: FakeClock) -> None:
    capacity = make_capacity(clock, "a", "b")
    assert capacity.open_models("interactive") is None
    assert fill(capacity, work=1.0) == 4
    assert capacity.open_models("interactive") == ["b"]


def test_no_more_jobs_than_allowed_whatever_the_engines_could_do(clock: FakeClock) -> None:
    capacity = make_capacity(clock, "a", "b", max_running=5)
    run_alone(capacity, clock, work=1.0, seconds=1e-3)
    assert fill(capacity, work=1.0) == 5
    assert capacity.open_models("interactive") == ()


def test_batch_work_takes_no_room_from_other_work(clock: FakeClock) -> None:
    capacity = make_capacity(clock, max_running=8)
    assert fill(capacity, work=1e9, priority="batch") == 4
    assert capacity.open_models("interactive") is None
    assert fill(capacity, work=1e9) == 4
    learnt = make_capacity(clock, max_running=8)
    run_alone(learnt, clock, work=10.0, seconds=2.0)
    assert fill(learnt, work=10.0, priority="batch") == 3  # of five seconds
    assert fill(learnt, work=1.0) == 8


def test_batch_work_ends_after_the_work_it_lets_pass(clock: FakeClock) -> None:
    capacity = make_capacity(clock)
    run_alone(capacity, clock, work=10.0, seconds=5.0)
    capacity.begin("batch", model="a", priority="batch", work=10.0)
    capacity.begin("interactive", model="a", priority="interactive", work=20.0)
    assert capacity.predict_end_s("interactive") == pytest.approx(10.0)
    assert capacity.predict_end_s("batch") == pytest.approx(15.0)


def test_what_is_done_of_a_job_makes_room(clock: FakeClock) -> None:
    capacity = make_capacity(clock)
    run_alone(capacity, clock, work=10.0, seconds=5.0)
    assert fill(capacity, work=60.0) == 1
    capacity.advance(("a", 0), done=0.5)
    assert fill(capacity, work=60.0) == 1


def test_what_runs_together_counts_once_so_batching_makes_room(clock: FakeClock) -> None:
    """Forty jobs in the ten seconds that one takes alone."""
    capacity = make_capacity(clock)
    for _ in range(30):
        keys = range(40)
        for key in keys:
            capacity.begin(key, model="a", priority="interactive", work=10.0)
            capacity.advance(key, done=0.0)
        clock.now += 10.0
        for key in keys:
            capacity.advance(key, done=1.0)
            capacity.end(key)
    assert capacity.predict_s("a", 10.0) == pytest.approx(0.25, rel=0.01)


def test_replicas_that_work_side_by_side_are_not_one_fast_replica(clock: FakeClock) -> None:
    capacity = make_capacity(clock)
    capacity.set_replicas({"a": 2})
    for key in "xy":
        capacity.begin(key, model="a", priority="interactive", work=10.0)
        capacity.advance(key, done=0.0)
    clock.now += 10.0
    for key in "xy":
        capacity.advance(key, done=1.0)
        capacity.end(key)
    assert capacity.predict_s("a", 10.0) == pytest.approx(10.0)


def test_waiting_and_keeping_files_are_not_the_engine_s_time(clock: FakeClock) -> None:
    capacity = make_capacity(clock)
    capacity.begin("x", model="a", priority="interactive", work=10.0)
    clock.now += 1000.0  # queued, or the model loads
    capacity.advance("x", done=0.0)
    clock.now += 5.0
    capacity.advance("x", done=1.0)
    clock.now += 1000.0  # a slow disk
    capacity.end("x")
    assert capacity.predict_s("a", 10.0) == pytest.approx(5.0)


def test_a_job_that_was_stopped_half_way_teaches_what_it_did(clock: FakeClock) -> None:
    capacity = make_capacity(clock)
    capacity.begin("x", model="a", priority="interactive", work=10.0)
    capacity.advance("x", done=0.0)
    clock.now += 5.0
    capacity.advance("x", done=0.5)
    capacity.end("x")
    assert capacity.predict_s("a", 10.0) == pytest.approx(10.0)


def test_a_speed_that_changes_is_followed(clock: FakeClock) -> None:
    capacity = make_capacity(clock)
    run_alone(capacity, clock, work=10.0, seconds=100.0)  # the first job, while kernels compile
    for _ in range(50):
        run_alone(capacity, clock, work=10.0, seconds=1.0)
    assert capacity.predict_s("a", 10.0) == pytest.approx(1.0, rel=0.1)


def test_a_closed_model_opens_again_by_itself(clock: FakeClock) -> None:
    capacity = make_capacity(clock, "a", "b")
    assert capacity.opens_in_s() is None
    capacity.close("a", for_s=7.0)
    capacity.close("a", for_s=2.0)
    assert capacity.open_models("interactive") == ["b"]
    assert capacity.opens_in_s() == pytest.approx(7.0)
    clock.now += 7.0
    assert capacity.open_models("interactive") is None
    assert capacity.opens_in_s() is None


def test_the_end_of_a_job_is_predicted(clock: FakeClock) -> None:
    capacity = make_capacity(clock)
    capacity.begin("x", model="a", priority="interactive", work=10.0)
    assert capacity.predict_end_s("x") is None
    capacity.end("x")
    run_alone(capacity, clock, work=10.0, seconds=5.0)
    for key in "xy":
        capacity.begin(key, model="a", priority="interactive", work=10.0)
    capacity.advance("x", done=0.5)
    assert capacity.predict_end_s("x") == pytest.approx(2.5)
    assert capacity.predict_end_s("y") == pytest.approx(7.5)  # behind the other


def test_a_model_that_is_not_served_any_more_disturbs_nothing(clock: FakeClock) -> None:
    capacity = make_capacity(clock)
    capacity.begin("x", model="retired", priority="interactive", work=10.0)
    capacity.advance("x", done=0.5)
    assert capacity.predict_end_s("x") is None
    capacity.close("retired", for_s=10.0)
    capacity.end("x")
    assert capacity.open_models("interactive") is None


def test_a_model_may_have_less_handed_out_than_others() -> None:
    ahead_s: dict[Priority, float] = {"interactive": _AHEAD_S, "batch": _BATCH_AHEAD_S}
    clock = FakeClock()
    capacity = Capacity(("a", "b"), ahead_s=ahead_s, max_running=64, most_ahead_s={"b": 10.0}, clock=clock)
    for model in ("a", "b"):
        run_alone(capacity, clock, work=1.0, seconds=1.0, model=model)
    assert fill(capacity, work=1.0, model="a") == 30
    assert fill(capacity, work=1.0, model="b") == 10
    assert fill(capacity, work=1.0, model="b", priority="batch") == 5
