"""Who steps next: order, budget, bounds, and that every row ends, whatever arrives or is cancelled."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from stable_audio_serve.engine.scheduler import RowId, Scheduler, SchedulerLimits
from stable_audio_serve.engine.work import Phase, RowWork
from tests.factories import FakeClock


def make_work(*, frames: int = 100, steps: int = 8, guided: int = 0) -> RowWork:
    return RowWork(frames, branches=[2] * guided + [1] * (steps - guided))


def make_scheduler(*, knee: float = 250, **limits: float) -> Scheduler:
    return Scheduler(SchedulerLimits(**limits), knee_tokens=lambda frames: knee)  # type: ignore[arg-type]


def add(scheduler: Scheduler, row_id: int, *, at: float = 0.0, alone_s: float = 1.0, **work: int) -> RowWork:
    row_work = make_work(**work)
    scheduler.add(RowId(row_id), row_work, arrived_at=at, alone_s=alone_s)
    return row_work


def test_nothing_waits_nothing_is_picked() -> None:
    assert make_scheduler().pick() == []


def test_equal_rows_run_first_come_to_completion() -> None:
    scheduler = make_scheduler(max_tokens=0)
    works = {row_id: add(scheduler, row_id, at=0.001 * row_id, steps=3) for row_id in range(3)}
    order = []
    while len(scheduler):
        (row_id,) = scheduler.pick()
        order.append(row_id)
        works[row_id].finish_evaluation()
        if works[row_id].phase is Phase.DONE:
            scheduler.remove(row_id)
    assert order == [0] * 3 + [1] * 3 + [2] * 3


def test_short_row_passes_long_one_that_came_first() -> None:
    scheduler = make_scheduler(max_tokens=0)
    add(scheduler, 0, at=0.0, alone_s=10.0)
    assert scheduler.pick() == [0]
    add(scheduler, 1, at=1.0, alone_s=0.1)
    assert scheduler.pick() == [1]


def test_long_row_is_not_passed_for_ever() -> None:
    scheduler = make_scheduler(max_tokens=0, slack=5.0)
    add(scheduler, 0, at=0.0, alone_s=10.0)
    add(scheduler, 1, at=50.0, alone_s=0.1)
    assert scheduler.pick() == [0]


def test_slack_is_bounded_however_long_the_work() -> None:
    scheduler = make_scheduler(max_tokens=0, max_slack_s=60.0)
    add(scheduler, 0, at=0.0, alone_s=10_000.0)
    add(scheduler, 1, at=61.0, alone_s=0.1)
    assert scheduler.pick() == [0]


def test_step_fills_up_to_the_knee_and_no_further() -> None:
    scheduler = make_scheduler(knee=250)
    for row_id in range(4):
        add(scheduler, row_id, frames=100)
    assert scheduler.pick() == [0, 1, 2]


def test_step_takes_a_quarter_of_what_waits() -> None:
    scheduler = make_scheduler(knee=250)
    for row_id in range(40):
        add(scheduler, row_id, frames=100)
    assert len(scheduler.pick()) == 10


def test_step_never_exceeds_the_cap_but_always_takes_one() -> None:
    scheduler = make_scheduler(knee=250, max_tokens=300)
    for row_id in range(40):
        add(scheduler, row_id, frames=200)
    assert scheduler.pick() == [0]
    wide = make_scheduler(max_tokens=300)
    add(wide, 0, frames=400)
    assert wide.pick() == [0]


def test_guided_evaluation_counts_twice() -> None:
    scheduler = make_scheduler(knee=250)
    for row_id in range(4):
        add(scheduler, row_id, frames=100, guided=8)
    assert scheduler.pick() == [0, 1]


def test_full_house_starts_nobody_else() -> None:
    scheduler = make_scheduler(max_started=2, knee=150)
    for row_id in (1, 2):
        add(scheduler, row_id, at=1.0)
    assert scheduler.pick() == [1, 2]
    add(scheduler, 3, at=0.0, alone_s=0.01)  # earliest deadline, but no room
    assert scheduler.pick() == [1, 2]
    scheduler.remove(RowId(1))
    assert scheduler.pick() == [3, 2]


def test_position_counts_rows_ahead() -> None:
    scheduler = make_scheduler()
    for row_id in range(3):
        add(scheduler, row_id, at=float(row_id))
    assert [scheduler.position(RowId(row_id)) for row_id in range(3)] == [0, 1, 2]


class EngineSimulation(RuleBasedStateMachine):
    """Rows arrive, step and are cancelled in any order on a fake clock."""

    limits = SchedulerLimits(max_started=4, max_tokens=1200, slack=5.0, max_slack_s=30.0)

    def __init__(self) -> None:
        super().__init__()
        self.clock = FakeClock()
        self.scheduler = Scheduler(self.limits, knee_tokens=lambda frames: 300)
        self.works: dict[int, RowWork] = {}
        self.deadlines: dict[int, float] = {}
        self.ended: list[int] = []
        self.num_added = 0

    @rule(
        frames=st.integers(1, 500),
        steps=st.integers(1, 20),
        guided=st.booleans(),
        alone_s=st.floats(0.001, 100, allow_nan=False),
        wait_s=st.floats(0, 5),
    )
    def arrive(self, frames: int, steps: int, guided: bool, alone_s: float, wait_s: float) -> None:
        self.clock.now += wait_s
        row_id = self.num_added
        self.num_added += 1
        self.works[row_id] = add(
            self.scheduler,
            row_id,
            at=self.clock.now,
            alone_s=alone_s,
            frames=frames,
            steps=steps,
            guided=guided * steps,
        )
        self.deadlines[row_id] = self.clock.now + min(5.0 * alone_s, 30.0)

    @precondition(lambda self: self.works)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.end(data.draw(st.sampled_from(sorted(self.works))))

    @rule()
    def step(self) -> None:
        started = {row_id for row_id in self.works if self.scheduler.is_started(RowId(row_id))}
        picked = self.scheduler.pick()
        assert bool(picked) == bool(self.works)
        assert len(set(picked)) == len(picked)
        tokens = [self.works[row_id].tokens for row_id in picked]
        assert len(picked) <= 1 or sum(tokens) <= self.limits.max_tokens
        # Nobody starves: the earliest deadline among the rows that may run always runs.
        room = len(started) < self.limits.max_started
        eligible = [row_id for row_id in self.works if room or row_id in started]
        if eligible:
            assert picked[0] == min(eligible, key=lambda row_id: (self.deadlines[row_id], row_id))
        self.clock.now += 0.01 * sum(tokens) / 100
        for row_id in picked:
            self.works[row_id].finish_evaluation()
            if self.works[row_id].phase is Phase.DONE:
                self.end(row_id)

    def end(self, row_id: int) -> None:
        self.scheduler.remove(RowId(row_id))
        del self.works[row_id]
        self.ended.append(row_id)

    @invariant()
    def bounds_hold(self) -> None:
        assert self.scheduler.num_started <= self.limits.max_started
        assert sorted(self.scheduler) == sorted(self.works)
        assert len(set(self.ended)) == len(self.ended)

    def teardown(self) -> None:
        """Whatever happened, what is left ends, each row once, in a bounded number of steps."""
        steps_left = sum(len(work.branches) - work.num_done for work in self.works.values())
        for _ in range(steps_left):
            self.step()
        assert not self.works
        assert sorted(self.ended) == list(range(self.num_added))


EngineSimulation.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
TestEngineSimulation = EngineSimulation.TestCase
