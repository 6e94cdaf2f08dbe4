from __future__ import annotations

import pytest

from stable_audio_serve.core.generation import Priority
from stable_audio_serve.core.pricing import Prices, WorkSize
from stable_audio_serve.jobs.runner.capacity import Capacity
from tests.factories import FakeClock

HALF_A_SECOND = Prices(row_ms=0.0, evaluation_ms=500.0, evaluated_second_ms=0.0, audio_second_ms=0.0)


def make_capacity(
    clock: FakeClock, *models: str, max_running: int = 64, prices: Prices | None = HALF_A_SECOND
) -> Capacity:
    return Capacity(models or ("a",), prices=lambda model: prices, max_running=max_running, clock=clock)


def begin(
    capacity: Capacity,
    key: object,
    *,
    work: float,
    model: str = "a",
    client: str = "",
    priority: Priority = "interactive",
    num_sections: int = 1,
) -> None:
    """Begin a job that is predicted to take `work` times half a second, the same time in each of its sections."""
    size, at_once = WorkSize(evaluations=work), WorkSize(evaluations=work / num_sections)
    capacity.begin(key, model=model, client=client, priority=priority, size=size, at_once=at_once)


def is_open(capacity: Capacity, *, model: str = "a", client: str = "", priority: Priority = "interactive") -> bool:
    models = capacity.open_models(priority)
    return (models is None or model in models) and (model, client) not in capacity.left_out(priority)


def fill(
    capacity: Capacity, *, work: float, model: str = "a", client: str = "", priority: Priority = "interactive"
) -> int:
    """Begin jobs, as `begin` does, until the capacity allows no more. Returns how many jobs began."""
    count = 0
    while is_open(capacity, model=model, client=client, priority=priority):
        key = (client or model, capacity.num_running)
        begin(capacity, key, work=work, model=model, client=client, priority=priority)
        count += 1
    return count


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def test_without_prices_each_replica_gets_a_few_jobs(clock: FakeClock) -> None:
    assert fill(make_capacity(clock, prices=None), work=1e9) == 4
    more = make_capacity(clock, prices=None)
    more.set_replicas({"a": 3})
    assert fill(more, work=1e9) == 12


def test_model_takes_jobs_up_to_its_budget_and_at_least_one(clock: FakeClock) -> None:
    capacity = make_capacity(clock)
    assert fill(capacity, work=10.0) == 6
    for index in range(6):
        capacity.end(("a", index))
    assert fill(capacity, work=1e6) == 1


def test_room_grows_with_the_replicas(clock: FakeClock) -> None:
    capacity = make_capacity(clock)
    capacity.set_replicas({"a": 3})
    assert fill(capacity, work=10.0) == 18


def test_each_replica_gets_a_job_however_long_it_is(clock: FakeClock) -> None:
    capacity = make_capacity(clock)
    capacity.set_replicas({"a": 3})
    assert fill(capacity, work=1e6) == 3
    assert fill(capacity, work=1e6, priority="batch") == 3


def test_model_without_replicas_gets_jobs(clock: FakeClock) -> None:
    capacity = make_capacity(clock)
    capacity.set_replicas({"a": 0})
    assert fill(capacity, work=10.0) == 6


def test_full_model_leaves_room_for_others(clock: FakeClock) -> None:
    capacity = make_capacity(clock, "a", "b")
    assert capacity.open_models("interactive") is None
    assert fill(capacity, work=20.0) == 3
    assert not is_open(capacity)
    assert is_open(capacity, model="b")


def test_long_job_delays_only_its_own_client(clock: FakeClock) -> None:
    capacity = make_capacity(clock, "a", "b")
    begin(capacity, "long", work=1e6, client="alice")
    assert not is_open(capacity, client="alice")
    assert is_open(capacity, client="alice", model="b")
    assert fill(capacity, work=10.0, client="bob") == 6
    for client in ("alice", "bob", "carol"):  # the other clients together have filled the limit once more
        assert not is_open(capacity, client=client)
    assert capacity.open_models("interactive") == ["b"]
    capacity.end("long")
    assert not is_open(capacity, client="bob")
    assert fill(capacity, work=10.0, client="carol") == 6


def test_jobs_never_exceed_the_limit(clock: FakeClock) -> None:
    capacity = make_capacity(clock, "a", "b", max_running=5)
    assert fill(capacity, work=1.0) == 5
    assert capacity.open_models("interactive") == ()


def test_batch_work_takes_no_room_from_interactive_work(clock: FakeClock) -> None:
    capacity = make_capacity(clock, max_running=8)
    assert fill(capacity, work=5.0, priority="batch") == 2  # two jobs of 2.5 s
    assert capacity.open_models("interactive") is None
    assert fill(capacity, work=1.0) == 8


def test_batch_job_ends_after_the_interactive_work(clock: FakeClock) -> None:
    capacity = make_capacity(clock)
    begin(capacity, "batch", work=10.0, priority="batch")
    begin(capacity, "interactive", work=20.0)
    assert capacity.predict_end_s("interactive") == pytest.approx(10.0)
    assert capacity.predict_end_s("batch") == pytest.approx(15.0)


def test_progress_of_a_job_frees_room(clock: FakeClock) -> None:
    capacity = make_capacity(clock)
    assert fill(capacity, work=60.0) == 1
    capacity.advance(("a", 0), done=0.5)
    assert fill(capacity, work=60.0) == 1


def test_closed_model_reopens_after_its_time(clock: FakeClock) -> None:
    capacity = make_capacity(clock, "a", "b")
    capacity.close("a", for_s=7.0)
    capacity.close("a", for_s=2.0)
    assert capacity.open_models("interactive") == ["b"]
    clock.now += 6.9
    assert capacity.open_models("interactive") == ["b"]
    clock.now += 0.1
    assert capacity.open_models("interactive") is None


def test_refused_clients_wait_for_their_time_or_for_room(clock: FakeClock) -> None:
    capacity = make_capacity(clock, "a", "b")
    capacity.refuse("a", "alice", for_s=7.0)
    capacity.refuse("a", "alice", for_s=2.0)
    capacity.refuse("b", "alice", for_s=8.0)
    assert capacity.open_models("interactive") is None
    clock.now += 6.9
    assert set(capacity.left_out("interactive")) == {("a", "alice"), ("b", "alice")}
    clock.now += 0.1
    assert set(capacity.left_out("interactive")) == {("b", "alice")}
    capacity.note_room("a")
    assert set(capacity.left_out("interactive")) == {("b", "alice")}
    capacity.note_room("b")
    assert not capacity.left_out("interactive")


def test_time_left_of_a_job_is_predicted(clock: FakeClock) -> None:
    capacity = make_capacity(clock)
    for key in "xy":
        begin(capacity, key, work=10.0)
    capacity.advance("x", done=0.5)
    assert capacity.predict_end_s("x") == pytest.approx(2.5)
    assert capacity.predict_end_s("y") == pytest.approx(7.5)  # 2.5 s for the rest of x, then 5 s for y
    begin(capacity, "piece", work=30.0, num_sections=3)
    assert capacity.predict_end_s("piece") == pytest.approx(22.5)  # after the rest of x and y
    unpriced = make_capacity(clock, prices=None)
    begin(unpriced, "x", work=10.0)
    assert unpriced.predict_end_s("x") is None


def test_removed_model_affects_no_other(clock: FakeClock) -> None:
    capacity = make_capacity(clock, prices=None)
    begin(capacity, "x", work=10.0, model="retired")
    capacity.advance("x", done=0.5)
    assert capacity.predict_end_s("x") is None
    capacity.close("retired", for_s=10.0)
    capacity.end("x")
    assert capacity.open_models("interactive") is None


def test_target_wait_bounds_the_budget_of_a_model(clock: FakeClock) -> None:
    capacity = Capacity(
        ("a", "b"),
        prices=lambda model: HALF_A_SECOND,
        max_running=100,
        target_wait_s={"b": 20.0},
        clock=clock,
    )
    assert fill(capacity, work=1.0, model="a") == 60
    assert fill(capacity, work=1.0, model="b") == 20
    assert fill(capacity, work=1.0, model="b", priority="batch") == 10
