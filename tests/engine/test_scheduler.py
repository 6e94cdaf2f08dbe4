"""Which rows the scheduler picks for a sampling step: their order, and the limits on rows, frames and memory."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from stable_audio_serve.core.generation import Priority
from stable_audio_serve.engine.scheduling.scheduler import Phase, RowId, RowWork, Scheduler, SchedulerLimits
from tests.factories import FakeClock


def make_work(*, frames: int = 100, steps: int = 8, guided: int = 0) -> RowWork:
    return RowWork(frames, branches=[2] * guided + [1] * (steps - guided))


def step_ms(works: Sequence[RowWork], num_new: int = 0) -> float:
    """Returns the predicted time of a step of these rows: 0.1 ms for each latent frame."""
    return sum(work.tokens for work in works) / 10


def make_scheduler(*, knee: float = 250, has_second_queue: bool = False, **limits: float) -> Scheduler:
    return Scheduler(
        SchedulerLimits(**limits),  # type: ignore[arg-type]
        knee_tokens=lambda frames: knee,
        step_ms=step_ms,
        has_second_queue=has_second_queue,
    )


def add(
    scheduler: Scheduler,
    row_id: int,
    *,
    at: float = 0.0,
    alone_s: float = 1.0,
    priority: Priority = "interactive",
    num_bytes: int = 0,
    **work: int,
) -> RowWork:
    row_work = make_work(**work)
    scheduler.add(RowId(row_id), row_work, arrived_at=at, alone_s=alone_s, priority=priority, num_bytes=num_bytes)
    return row_work


def test_pick_is_empty_without_rows() -> None:
    assert make_scheduler().pick() == []


def let_decode(work: RowWork, *, frames: int = 100) -> None:
    """Finish a row's sampling steps, so that only the decoding of `frames` latent frames remains."""
    while work.num_done < len(work.branches):
        work.finish_evaluation()
    work.decode_left = (frames,)


def test_rows_that_decode_in_parallel_do_not_use_the_budget_of_a_step() -> None:
    for has_second_queue, picked in ((False, [0, 1, 2]), (True, [0, 1, 2, 3, 4])):
        scheduler = make_scheduler(knee=300, has_second_queue=has_second_queue)
        works = [add(scheduler, row_id, at=0.001 * row_id) for row_id in range(9)]
        assert scheduler.pick() == [0, 1, 2]
        for row_id in (0, 2):
            let_decode(works[row_id])
        assert scheduler.pick() == picked


def test_without_room_in_the_second_queue_only_steps_are_picked() -> None:
    scheduler = make_scheduler(has_second_queue=True)
    works = [add(scheduler, row_id, at=0.001 * row_id) for row_id in range(2)]
    scheduler.pick()
    let_decode(works[0])
    assert scheduler.pick(use_second_queue=False) == [1]
    assert scheduler.pick() == [0, 1]
    let_decode(works[1])
    assert scheduler.pick(use_second_queue=False) == []
    assert scheduler.pick() == [0, 1]


def test_a_row_that_waits_for_the_second_queue_keeps_its_place() -> None:
    scheduler = make_scheduler(has_second_queue=True, max_started=2)
    add(scheduler, 0, steps=20)
    assert scheduler.pick() == [0]
    edit = RowWork(100, branches=[1], encode_left=(100,))
    scheduler.add(RowId(1), edit, arrived_at=0.1, alone_s=1.0)
    add(scheduler, 2, at=0.2)
    assert scheduler.pick(use_second_queue=False) == [0]
    assert scheduler.pick() == [0, 1]


def test_batch_rows_pay_for_decoding_in_parallel_to_interactive_steps() -> None:
    scheduler = make_scheduler(has_second_queue=True, batch_share=0.125)
    let_decode(add(scheduler, 0, priority="batch"), frames=100)
    assert scheduler.pick() == [0]  # alone
    add(scheduler, 1, at=1.0, frames=200, steps=99)
    # Each interactive step of 20 ms allows 2.5 ms of batch work. After four steps, that is the 10 ms of decoding row 0.
    assert [scheduler.pick() for _ in range(4)] == [[1], [1], [1], [1, 0]]


def test_equal_rows_run_first_come_to_completion() -> None:
    scheduler = make_scheduler(max_tokens=0)
    works = {row_id: add(scheduler, row_id, at=0.001 * row_id, steps=3) for row_id in range(3)}
    order = []
    while works:
        (row_id,) = scheduler.pick()
        order.append(row_id)
        works[row_id].finish_evaluation()
        if works[row_id].phase is Phase.DONE:
            scheduler.remove(row_id)
            del works[row_id]
    assert order == [0] * 3 + [1] * 3 + [2] * 3


def test_short_row_overtakes_an_earlier_long_one() -> None:
    scheduler = make_scheduler(max_tokens=0)
    add(scheduler, 0, at=0.0, alone_s=10.0)
    assert scheduler.pick() == [0]
    add(scheduler, 1, at=1.0, alone_s=0.1)
    assert scheduler.pick() == [1]


def test_long_row_is_not_overtaken_forever() -> None:
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


def test_step_takes_a_quarter_of_the_waiting_frames() -> None:
    scheduler = make_scheduler(knee=250)
    for row_id in range(40):
        add(scheduler, row_id, frames=100)
    assert len(scheduler.pick()) == 10


def test_the_quarter_follows_the_remaining_work() -> None:
    scheduler = make_scheduler(knee=250)
    works = [add(scheduler, row_id, frames=100, guided=1) for row_id in range(40)]
    picked = scheduler.pick()
    assert len(picked) == 10  # a step takes a quarter of the waiting 40 x 200 frames
    for row_id in picked:
        # Guidance applied only to this evaluation, so the row's later ones have 100 frames.
        works[row_id].finish_evaluation()
    # Ten rows of 100 frames and four of 200 are a quarter of the waiting 10 x 100 + 30 x 200 frames, rounded up.
    assert len(scheduler.pick()) == 14
    for row_id in range(14, 40):
        scheduler.remove(RowId(row_id))
    assert len(scheduler.pick()) == 5  # a quarter of 10 x 100 + 4 x 200


def test_step_never_exceeds_the_cap_but_always_takes_one() -> None:
    scheduler = make_scheduler(knee=250, max_tokens=300)
    for row_id in range(40):
        add(scheduler, row_id, frames=200)
    assert scheduler.pick() == [0]
    wide = make_scheduler(max_tokens=300)
    add(wide, 0, frames=400)
    assert wide.pick() == [0]


@pytest.mark.parametrize(("frames", "picked"), [(275, [0, 1]), (276, [0])])  # 375 is one and a half times the knee
def test_long_row_does_not_fill_a_step_far_beyond_the_knee(frames: int, picked: list[int]) -> None:
    scheduler = make_scheduler(knee=250)
    add(scheduler, 0, frames=100)
    add(scheduler, 1, frames=frames, alone_s=2.0)
    add(scheduler, 2, frames=100, alone_s=3.0)
    assert scheduler.pick() == picked


def test_guided_evaluation_counts_twice() -> None:
    scheduler = make_scheduler(knee=300)
    for row_id in range(4):
        add(scheduler, row_id, frames=100, guided=8)
    assert scheduler.pick() == [0, 1]


def test_no_row_starts_at_the_limit_of_started_rows() -> None:
    scheduler = make_scheduler(max_started=2, knee=150)
    for row_id in (1, 2):
        add(scheduler, row_id, at=1.0)
    assert scheduler.pick() == [1, 2]
    add(scheduler, 3, at=0.0, alone_s=0.01)  # its deadline is the earliest, but two rows have started already
    assert scheduler.pick() == [1, 2]
    scheduler.remove(RowId(1))
    assert scheduler.pick() == [3, 2]


def test_position_counts_rows_ahead() -> None:
    scheduler = make_scheduler()
    for row_id in range(3):
        add(scheduler, row_id, at=float(row_id))
    assert [scheduler.position(RowId(row_id)) for row_id in range(3)] == [0, 1, 2]


def test_interactive_row_passes_batch_rows_at_the_next_step() -> None:
    scheduler = make_scheduler(max_tokens=0)
    for row_id in range(3):
        add(scheduler, row_id, priority="batch", at=-100.0)
    assert scheduler.pick() == [0]
    add(scheduler, 3)
    assert scheduler.position(RowId(3)) == 0
    assert [scheduler.position(RowId(row_id)) for row_id in range(3)] == [1, 2, 3]
    assert [scheduler.pick() for _ in range(7)] == [[3]] * 7


def test_batch_rows_leave_slots_for_interactive_rows() -> None:
    scheduler = make_scheduler(max_started=4, max_tokens=100_000, knee=100_000)
    for row_id in range(10):
        add(scheduler, row_id, priority="batch")
    assert scheduler.pick() == [0, 1, 2]
    add(scheduler, 10)
    assert scheduler.pick() == [10]


def test_batch_rows_leave_memory_for_interactive_rows() -> None:
    scheduler = make_scheduler(max_bytes=100, knee=1000)
    for row_id in range(4):
        add(scheduler, row_id, priority="batch", num_bytes=25)
    assert scheduler.pick() == [0, 1, 2]
    add(scheduler, 4, num_bytes=25)
    assert 4 in scheduler.pick()


@pytest.mark.parametrize("num_bytes", [30, 80])
def test_batch_row_starts_although_interactive_rows_take_the_memory(num_bytes: int) -> None:
    scheduler = make_scheduler(max_bytes=100)
    add(scheduler, 0, priority="batch", num_bytes=num_bytes)
    works: dict[int, RowWork] = {}
    picked: list[RowId] = []
    for step in range(200):
        while len(works) < 2:  # two clients, each of which sends its next request after the last one
            row_id = 1000 + 2 * step + len(works)
            works[row_id] = add(scheduler, row_id, at=step / 100, alone_s=0.1, num_bytes=30, steps=5 + row_id % 3)
        picked = scheduler.pick()
        if 0 in picked:
            return
        for row_id in picked:
            works[row_id].finish_evaluation()
            if works[row_id].phase is Phase.DONE:
                scheduler.remove(row_id)
                del works[row_id]
    raise AssertionError("the batch row never started")


def test_small_batch_rows_leave_lent_time_to_a_large_one() -> None:
    scheduler = make_scheduler(max_tokens=1000, knee=1000)
    works = {row_id: add(scheduler, row_id, frames=90, steps=9999) for row_id in range(100, 110)}
    works[0] = add(scheduler, 0, priority="batch", frames=10, steps=9999)
    works[1] = add(scheduler, 1, at=1.0, priority="batch", frames=400, steps=9999)  # it needs steps of its own
    for _ in range(1000):
        for row_id in scheduler.pick():
            works[row_id].finish_evaluation()
    batch_ms = works[0].num_done * 1.0 + works[1].num_done * 40.0
    assert batch_ms / (works[100].num_done * 90.0) == pytest.approx(0.125, abs=0.005)
    assert works[1].num_done > 100


def test_interactive_rows_leave_a_slot_for_a_batch_row() -> None:
    scheduler = make_scheduler(max_started=3, max_tokens=100_000, knee=100_000)
    for row_id in range(10):
        add(scheduler, row_id)
    add(scheduler, 10, priority="batch")
    assert scheduler.pick() == [0, 1]


def test_batch_rows_join_a_step_if_they_cost_nothing() -> None:
    free = Scheduler(SchedulerLimits(), knee_tokens=lambda frames: 0, step_ms=lambda works, num_new: 5.0)
    add(free, 0)
    for row_id in range(1, 4):
        add(free, row_id, priority="batch")
    assert free.pick() == [0, 1, 2, 3]


def test_a_step_with_batch_rows_stays_within_its_tokens() -> None:
    scheduler = Scheduler(
        SchedulerLimits(max_tokens=250), knee_tokens=lambda frames: 0, step_ms=lambda works, num_new: 5.0
    )
    for row_id in range(4):
        add(scheduler, row_id, priority="batch" if row_id else "interactive")
    assert scheduler.pick() == [0, 1]


@given(
    batch=st.lists(st.tuples(st.integers(1, 100), st.integers(1, 12)), min_size=1, max_size=6),
    interactive=st.lists(st.integers(50, 400), min_size=1, max_size=5),
    max_tokens=st.sampled_from([0, 300, 1000]),
    share=st.sampled_from([0.05, 0.125, 0.5]),
)
def test_batch_rows_get_their_share_of_a_busy_engine_and_no_more(
    batch: list[tuple[int, int]], interactive: list[int], max_tokens: int, share: float
) -> None:
    """Batch rows get at most their share of a busy engine.

    The first unfinished batch row takes its next step as soon as `share` times the interactive work since the row's
    last step is as long as the next step.
    """
    scheduler = make_scheduler(max_tokens=max_tokens, batch_share=share, knee=300)
    works = {}
    for row_id, (frames, steps) in enumerate(batch):
        works[row_id] = add(scheduler, row_id, priority="batch", frames=frames, steps=steps)
    for row_id, frames in enumerate(interactive, 100):
        works[row_id] = add(scheduler, row_id, frames=frames, steps=5000)
    left = set(range(len(batch)))
    longest_ms = max(frames for frames, _ in batch) / 10
    longest_step_ms = max(max_tokens, *interactive) / 10
    interactive_ms = batch_ms = waited_ms = 0.0
    while left:
        picked = scheduler.pick()
        mine = [row_id for row_id in picked if row_id < 100]
        interactive_step_ms = step_ms([works[row_id] for row_id in picked if row_id >= 100])
        interactive_ms += interactive_step_ms
        batch_ms += step_ms([works[row_id] for row_id in mine])
        assert batch_ms <= share * interactive_ms + 1e-6
        waited_ms = 0.0 if min(left) in mine else waited_ms + interactive_step_ms
        assert share * (waited_ms - longest_step_ms) <= longest_ms + 1e-6
        for row_id in mine:
            works[row_id].finish_evaluation()
            if works[row_id].phase is Phase.DONE:
                scheduler.remove(RowId(row_id))
                left.discard(row_id)


class EngineSimulation(RuleBasedStateMachine):
    """A state machine test of the scheduler: rows arrive, take steps and are cancelled at random, on a fake clock."""

    limits = SchedulerLimits(max_started=4, max_tokens=1200, slack=5.0, max_slack_s=30.0)

    def __init__(self) -> None:
        super().__init__()
        self.clock = FakeClock()
        self.scheduler = Scheduler(self.limits, knee_tokens=lambda frames: 300, step_ms=step_ms)
        self.works: dict[int, RowWork] = {}
        self.priorities: dict[int, Priority] = {}
        self.deadlines: dict[int, float] = {}
        self.started: set[int] = set()
        self.ended: list[int] = []
        self.num_added = 0

    @rule(
        frames=st.integers(1, 500),
        steps=st.integers(1, 20),
        guided=st.booleans(),
        alone_s=st.floats(0.001, 100, allow_nan=False),
        wait_s=st.floats(0, 5),
        priority=st.sampled_from(["interactive", "batch"]),
    )
    def arrive(self, frames: int, steps: int, guided: bool, alone_s: float, wait_s: float, priority: Priority) -> None:
        self.clock.now += wait_s
        row_id = self.num_added
        self.num_added += 1
        self.works[row_id] = add(
            self.scheduler,
            row_id,
            at=self.clock.now,
            alone_s=alone_s,
            priority=priority,
            frames=frames,
            steps=steps,
            guided=guided * steps,
        )
        self.priorities[row_id] = priority
        self.deadlines[row_id] = self.clock.now + min(5.0 * alone_s, 30.0)

    @precondition(lambda self: self.works)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.end(data.draw(st.sampled_from(sorted(self.works))))

    @rule()
    def step(self) -> None:
        started = self.started.copy()
        picked = self.scheduler.pick()
        self.started.update(picked)
        assert bool(picked) == bool(self.works)
        assert len(set(picked)) == len(picked)
        tokens = [self.works[row_id].tokens for row_id in picked]
        assert len(picked) <= 1 or sum(tokens) <= self.limits.max_tokens
        # No row waits forever: of the rows of each priority, the one with the earliest deadline that may run is picked.
        batch = {row_id for row_id in self.works if self.priorities[row_id] == "batch"}
        interactive = set(self.works) - batch
        room = self.limits.max_started - len(started)
        self.check_order(picked, interactive, interactive & started, room - (bool(batch) and not started & batch))
        places = min(room - len(set(picked) - batch - started), 3 - len(started & batch))
        if interactive - started and not interactive.intersection(picked):
            # The step has batch rows only. The free places may be reserved for interactive rows, which start next.
            places = 0 if started.intersection(picked) else places
        # In a step of one batch row alone, earlier batch rows are left out if they could share a step with interactive
        # rows. They run later: `test_small_batch_rows_leave_lent_time_to_a_large_one`.
        if not (interactive and len(picked) == 1):
            self.check_order(picked, batch, batch & started, places)
        self.clock.now += 0.01 * sum(tokens) / 100
        for row_id in picked:
            self.works[row_id].finish_evaluation()
            if self.works[row_id].phase is Phase.DONE:
                self.end(row_id)

    def order(self, row_id: int) -> tuple[float, int]:
        return self.deadlines[row_id], row_id

    def check_order(self, picked: list[RowId], line: set[int], started: set[int], places: int) -> None:
        """Assert that, if rows of `line` are picked, the row of `line` with the earliest deadline is among them.

        If no more rows may start (`places` is not positive), only the `started` rows of `line` are considered.
        """
        if line.intersection(picked):
            assert min(line if places > 0 else started, key=self.order) in picked

    def end(self, row_id: int) -> None:
        self.scheduler.remove(RowId(row_id))
        del self.works[row_id]
        self.started.discard(row_id)
        self.ended.append(row_id)

    @invariant()
    def bounds_hold(self) -> None:
        assert len(self.started) <= self.limits.max_started
        assert {row_id for row_id in range(self.num_added) if RowId(row_id) in self.scheduler} == set(self.works)
        assert len(set(self.ended)) == len(self.ended)

    def teardown(self) -> None:
        """Assert that all remaining rows end, each once, within as many steps as they have left."""
        steps_left = sum(len(work.branches) - work.num_done for work in self.works.values())
        for _ in range(steps_left):
            self.step()
        assert not self.works
        assert sorted(self.ended) == list(range(self.num_added))


EngineSimulation.TestCase.settings = settings(stateful_step_count=40)
TestEngineSimulation = EngineSimulation.TestCase
