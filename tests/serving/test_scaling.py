"""How many replicas predicted work asks for, counted by hand."""

from __future__ import annotations

import math

import pytest

from stable_audio_serve.serving.scaling import Goal, Memory, Observed, decide, rate

GOAL = Goal(target_wait_s=10.0, grow_after_s=0.0, shrink_after_s=30.0)


class Model:
    """Decisions about one model, one after the other; what it aims at becomes its target."""

    def __init__(self, *, target: int = 1, goal: Goal = GOAL) -> None:
        self.target = target
        self._goal = goal
        self._memory = Memory()

    def decide(self, now: float, **seen: float) -> int:
        self.target, self._memory = decide(self._memory, Observed(**seen), goal=self._goal, target=self.target, now=now)
        return self.target


@pytest.mark.parametrize(("backlog_s", "replicas"), [(0.1, 1), (10.0, 1), (10.1, 2), (95.0, 10), (4000.0, 400)])
def test_a_backlog_is_shared_out_so_that_no_share_takes_longer_than_the_target(backlog_s: float, replicas: int) -> None:
    assert Model().decide(0.0, backlog_s=backlog_s) == replicas


def test_arriving_work_keeps_the_replicas_it_uses_but_asks_for_no_more() -> None:
    for target, kept in ((1, 1), (3, 3), (9, 3)):
        model = Model(target=target)
        for now in range(32):
            model.decide(float(now), arriving=2.4, num_requests=20)  # three replicas at four fifths of their time
        assert model.target == kept


def test_one_client_that_always_has_one_request_uses_one_replica() -> None:
    model = Model(target=2)
    for now in range(32):
        model.decide(float(now), arriving=0.97, num_requests=1, backlog_s=0.5)
    assert model.target == 1


def test_a_model_that_loads_slowly_gets_replicas_earlier_while_its_backlog_rises() -> None:
    fast, slow = Model(), Model()
    for now in range(9):
        fast.decide(float(now), backlog_s=float(now), load_s=1.0)
        slow.decide(float(now), backlog_s=float(now), load_s=60.0)
    assert fast.target == 1  # 8 s, and as much as 0.8 s more until it could help
    assert slow.target == 2  # 8 s rose, and 8 s more will have when it could help


def test_a_backlog_that_stays_is_not_taken_to_rise() -> None:
    model = Model()
    for now in range(200):
        model.decide(float(now), backlog_s=9.0, load_s=60.0)
    assert model.target == 1


def test_the_load_time_is_remembered_when_no_replica_is_left_to_say_it() -> None:
    model = Model(target=0)
    model.decide(0.0, load_s=60.0)
    for now in range(1, 10):
        model.decide(float(now), backlog_s=now - 1.0)
    assert model.target == 2


def test_replicas_go_one_step_at_a_time_down_to_the_most_that_was_wanted_lately() -> None:
    model = Model(target=4)
    seen = [model.decide(float(now), backlog_s=25.0 if now == 10 else 5.0) for now in range(60)]
    assert seen[:30] == [4] * 30
    assert seen[30:40] == [3] * 10  # wanted at 10 s
    assert seen[40:] == [1] * 20


@pytest.mark.parametrize(
    ("target", "backlog_s", "after_s"), [(1, 15.0, 3.0), (1, 35.0, 1.0), (10, 105.0, 30.0), (10, 200.0, 3.0)]
)
def test_the_more_there_is_the_sooner_replicas_are_added(target: int, backlog_s: float, after_s: float) -> None:
    """Two for one replica is as much too much as twenty for ten."""
    model = Model(target=target, goal=Goal(target_wait_s=10.0, grow_after_s=3.0, shrink_after_s=30.0))
    seen = [model.decide(now / 10, backlog_s=backlog_s) for now in range(400)]
    assert seen.index(math.ceil(backlog_s / 10)) == pytest.approx(after_s * 10, abs=1)


def test_work_that_is_done_before_it_counts_adds_no_replica_later() -> None:
    model = Model(goal=Goal(target_wait_s=10.0, grow_after_s=3.0, shrink_after_s=30.0))
    for start in range(0, 1000, 20):
        for tenth in range(20):  # one second of too much, one of enough
            assert model.decide((start + tenth) / 10, backlog_s=15.0 if tenth < 10 else 5.0) == 1


def test_a_model_without_replicas_gets_one_at_once() -> None:
    assert (
        Model(target=0, goal=Goal(target_wait_s=10.0, grow_after_s=60.0, shrink_after_s=30.0)).decide(
            0.0, num_requests=1
        )
        == 1
    )


def test_flickering_work_keeps_the_number_it_needs_at_most() -> None:
    model = Model(target=1)
    seen = {model.decide(now / 10, backlog_s=30.0 if now % 100 < 5 else 2.0) for now in range(3000)}
    assert seen == {3}


def test_an_idle_model_goes_to_zero_and_a_request_keeps_one() -> None:
    model = Model(target=1)
    assert [model.decide(float(now), num_requests=1) for now in range(40)] == [1] * 40
    seen = [model.decide(float(now)) for now in range(40, 80)]
    assert seen == [1] * 29 + [0] * 11


def test_what_rounding_leaves_of_a_backlog_keeps_no_replica() -> None:
    model = Model(target=1)
    left_s = 0.1 + 0.2 - 0.3
    assert left_s > 0.0
    assert [model.decide(float(now), backlog_s=left_s) for now in range(40)][-1] == 0


def test_a_replica_that_a_held_request_woke_stays_for_a_while_although_nobody_decided_meanwhile() -> None:
    model = Model(target=0)
    model.decide(0.0)
    model.target = 1  # Serve's own doing
    assert model.decide(60.0) == 1
    assert model.decide(89.0) == 1


@pytest.mark.slow
def test_the_memory_stays_small() -> None:
    model = Model()
    for now in range(20_000):
        model.decide(now / 10, backlog_s=float(now * 7919 % 4000), load_s=1e9)
    assert len(model._memory.backlogs) < 200
    assert len(model._memory.wanted) < 401


def test_the_rate_of_a_count_is_over_the_whole_window() -> None:
    assert rate([]) == 0.0
    assert rate([(0.0, 5.0)]) == 0.0
    assert rate([(0.0, 5.0), (2.0, 25.0)]) == 2.0  # two seconds of the ten
    assert rate([(0.0, 0.0), (90.0, 100.0), (95.0, 140.0), (100.0, 180.0)]) == 8.0


def test_a_clock_that_is_set_back_pins_nothing() -> None:
    model = Model(target=1)
    model.decide(10_000.0, backlog_s=95.0)
    seen = [model.decide(float(now), backlog_s=5.0) for now in range(40)]
    assert seen[0] == 10
    assert seen[-1] == 1
