"""Decides which rows the engine works on next. No tensors, no device.

Deadlines. A row's deadline is its arrival time + slack x its predicted time alone, at most `max_slack_s` after arrival.
It never changes. So short rows overtake long ones, but every row has the earliest deadline at some point. Round-robin
would make all rows finish late.

Filling a step. Rows join a step in order of deadline until it has enough latent frames to make its fixed cost small
(`knee_tokens`), or a quarter of all waiting frames if that is more, because larger steps then finish the queue sooner.
A step never has more than `max_tokens`. Started rows hold device memory, so their number is limited. If a row does not
fit into memory, no later row starts. Otherwise small rows could keep a large one waiting forever.

Lending to batch rows. Interactive rows go first, and each interactive step lends `batch_share` of its time to batch
rows. A batch row joins the step if the lent time covers the time that it adds; if the step has no room, the row gets a
step of its own once the lent time covers that. Lent time accumulates until then. So an interactive row takes at most
this share longer, plus one step, and batch rows progress under any interactive load. Lent time is dropped when no batch
row needs it.

Second queue. On devices that have one, rows encode or decode on it during a step, and do not count towards the step's
latent frames. Both queues share the device's time.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import NewType

from stable_audio_serve.core.generation import Priority
from stable_audio_serve.engine.scheduling.work import Phase, RowWork

RowId = NewType("RowId", int)


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """Limits of one pick. With `max_tokens` 0, rows are picked one at a time."""

    max_started: int = 64  # at least 2; a quarter, at least one row, is only for interactive rows, one row for batch
    max_tokens: int = 16_384
    slack: float = 6.0
    max_slack_s: float = 120.0
    batch_share: float = 0.125
    max_bytes: int | None = None  # device memory of all started rows; None: no limit


@dataclass(slots=True, order=True)
class _Entry:
    deadline_at: float
    row_id: RowId  # ids rise with arrival, so ties run in order of arrival
    work: RowWork = field(compare=False)
    priority: Priority = field(compare=False)
    tokens: int = field(compare=False)  # the row's part of the sum of waiting tokens
    num_bytes: int = field(compare=False)
    started: bool = field(default=False, compare=False)


@dataclass(slots=True)
class _Step:
    entries: list[_Entry] = field(default_factory=list)
    num_new: int = 0
    num_new_batch: int = 0
    new_bytes: int = 0
    waits_for_memory: bool = False  # a row waits for memory, so no later row starts
    tokens: float = 0.0
    second_queue_frames: float = 0.0  # latent frames of the rows that encode or decode during the step
    waits_for_second_queue: bool = False  # a row waits for room on the second queue

    @property
    def works(self) -> list[RowWork]:
        return [entry.work for entry in self.entries]


class Scheduler:
    """Holds all rows from admission to their end and picks rows for each turn. Used by one thread.

    Between two picks, the `work` of rows that were not picked must not change. Unknown ids raise KeyError.
    """

    def __init__(
        self,
        limits: SchedulerLimits,
        *,
        knee_tokens: Callable[[int], float],
        step_ms: Callable[[Sequence[RowWork], int], float],
        has_second_queue: bool = False,
    ) -> None:
        """`knee_tokens(frames)` is the number of latent frames above which the fixed cost of a step of such rows is
        small. `step_ms(works, num_new)` predicts the time of a step of rows, of which `num_new` were never picked
        before. With `has_second_queue`, rows encode or decode on a second queue during a step.
        """
        self._has_second_queue = has_second_queue
        self._limits = limits
        self._knee_tokens = knee_tokens
        self._step_ms = step_ms
        self._orders: dict[Priority, list[_Entry]] = {"interactive": [], "batch": []}
        self._entries: dict[RowId, _Entry] = {}
        self._num_started: dict[Priority, int] = dict.fromkeys(self._orders, 0)
        self._started_bytes = 0
        self._waiting_tokens: dict[Priority, int] = dict.fromkeys(self._orders, 0)
        self._picked: list[_Entry] = []
        self._lent_ms = 0.0  # time lent by interactive steps and not used yet

    def add(
        self,
        row_id: RowId,
        work: RowWork,
        *,
        arrived_at: float,
        alone_s: float,
        priority: Priority = "interactive",
        num_bytes: int = 0,
    ) -> None:
        """Add a row. `arrived_at` is on the engine's clock; `alone_s` is its predicted time on an idle engine.

        `num_bytes` is its device memory from its first pick to its removal.
        """
        if row_id in self._entries:
            raise ValueError(f"row {row_id} was already added")
        slack_s = min(self._limits.slack * alone_s, self._limits.max_slack_s)
        entry = _Entry(arrived_at + slack_s, row_id, work, priority, self._tokens(work), num_bytes)
        self._entries[row_id] = entry
        self._waiting_tokens[priority] += entry.tokens
        insort(self._orders[priority], entry)

    def remove(self, row_id: RowId) -> None:
        """Remove a row that ended."""
        entry = self._entries.pop(row_id)
        order = self._orders[entry.priority]
        del order[bisect_left(order, entry)]
        self._num_started[entry.priority] -= entry.started
        self._started_bytes -= entry.num_bytes if entry.started else 0
        self._waiting_tokens[entry.priority] -= entry.tokens

    def pick(self, *, use_second_queue: bool = True) -> list[RowId]:
        """Return the rows to run now, earliest deadline first; empty only if no row is left.

        Without `use_second_queue`, only rows that denoise are picked, and the result may be empty while other rows wait
        for the second queue. Picked rows count as started until removed. A row starts only if fewer than `max_started`
        rows have started and it fits into memory. If it does not fit into memory, no later row starts before it.
        """
        self._update_waiting_tokens()
        step = self._fill("interactive", use_second_queue=use_second_queue)
        if step.entries or step.waits_for_second_queue:
            step = self._lend(step, use_second_queue=use_second_queue)
        else:
            self._lent_ms = 0.0
            step = self._fill("batch", use_second_queue=use_second_queue, waits_for_memory=step.waits_for_memory)
        for entry in step.entries:
            self._num_started[entry.priority] += not entry.started
            self._started_bytes += 0 if entry.started else entry.num_bytes
            entry.started = True
        self._picked = step.entries
        return [entry.row_id for entry in step.entries]

    def _update_waiting_tokens(self) -> None:
        """Update the sum of waiting tokens after the rows of the last pick have run."""
        for entry in self._picked:
            if self._entries.get(entry.row_id) is entry:
                tokens = self._tokens(entry.work)
                self._waiting_tokens[entry.priority] += tokens - entry.tokens
                entry.tokens = tokens

    def _uses_second_queue(self, work: RowWork) -> bool:
        return self._has_second_queue and work.phase is not Phase.DENOISE

    def _tokens(self, work: RowWork) -> int:
        """Return how many latent frames the row adds to a step; 0 if it runs on the second queue."""
        return 0 if self._uses_second_queue(work) else work.tokens

    def _fill(self, priority: Priority, *, use_second_queue: bool, waits_for_memory: bool = False) -> _Step:
        """Return a step of rows of one priority, as many as the budgets of the step and of the second queue allow."""
        step, budget, second_budget, is_full = _Step(waits_for_memory=waits_for_memory), 0.0, 0.0, False
        num_left = self._num_started[priority]  # started rows not visited yet
        for entry in self._orders[priority]:
            if is_full and not num_left:
                break  # no later row has started, so none encodes or decodes
            if not self._may_run(entry, step=step):
                if not num_left:
                    break  # no later row is started, so none may run
                continue
            num_left -= entry.started
            if self._uses_second_queue(entry.work):
                step.waits_for_second_queue |= not use_second_queue
                second_budget = second_budget or self._budget(priority, entry.work.frames)
                if use_second_queue and (not step.second_queue_frames or step.second_queue_frames < second_budget):
                    _take_on_second_queue(step, entry)
                else:
                    _reserve(step, entry)  # counts the row as started, so that no later row starts in its place
            elif is_full:
                continue
            elif not step.tokens:
                budget = self._budget(priority, entry.work.frames)
                _take(step, entry)
            elif step.tokens >= budget or step.tokens + entry.tokens > self._limits.max_tokens:
                is_full = True
                if not self._has_second_queue:
                    break
            else:
                _take(step, entry)
        return step

    def _lend(self, step: _Step, *, use_second_queue: bool) -> _Step:
        """Add the batch rows that lent time covers to the interactive step, or return a step of one batch row."""
        if not self._orders["batch"]:
            self._lent_ms = 0.0
            return step
        ms = self._step_ms(step.works, step.num_new)
        share_ms = self._limits.batch_share * ms
        num_interactive = len(step.entries)
        for entry in self._orders["batch"]:
            if not self._may_run(entry, step=step):
                continue
            is_second = self._uses_second_queue(entry.work)
            if is_second and not use_second_queue:
                continue
            new = int(not entry.started)
            joins = is_second or step.tokens + entry.tokens <= self._limits.max_tokens
            if not joins and len(step.entries) > num_interactive:
                break  # the step has no room left, and other batch rows joined it, so a separate step must wait
            works = [*step.works, entry.work] if joins else [entry.work]
            costs_ms = self._step_ms(works, step.num_new + new) - ms if joins else self._step_ms(works, new)
            if costs_ms > self._lent_ms + (share_ms if joins else 0.0):
                self._lent_ms += share_ms
                return step
            self._lent_ms -= max(0.0, costs_ms)
            if not joins:
                return _take(_Step(), entry)
            ms += costs_ms
            (_take_on_second_queue if is_second else _take)(step, entry)
        self._lent_ms = 0.0  # no batch row is waiting for lent time
        return step

    def _may_run(self, entry: _Entry, *, step: _Step) -> bool:
        """Return whether the row has started, or there is room and memory to start it."""
        if entry.started:
            return True
        if self._limits.max_bytes is not None:
            taken = self._started_bytes + step.new_bytes
            if taken and taken + entry.num_bytes > self._limits.max_bytes:
                step.waits_for_memory = True
            if step.waits_for_memory:
                return False
        most, num_started = self._limits.max_started, self.num_started + step.num_new
        num_batch = self._num_started["batch"] + step.num_new_batch
        if entry.priority == "batch":
            return num_batch < most - max(most // 4, 1) and num_started < most
        reserves_batch_slot = not num_batch and bool(self._orders["batch"])
        return num_started < most - reserves_batch_slot

    def _budget(self, priority: Priority, frames: int) -> float:
        """Return max(knee, a quarter of the waiting tokens), capped at `max_tokens`."""
        cap = self._limits.max_tokens
        if cap == 0:
            return 0.0
        return min(max(self._knee_tokens(frames), self._waiting_tokens[priority] / 4), cap)

    def position(self, row_id: RowId) -> int:
        """Return how many rows have an earlier deadline; for a batch row, interactive rows count too."""
        entry = self._entries[row_id]
        ahead = len(self._orders["interactive"]) if entry.priority == "batch" else 0
        return ahead + bisect_left(self._orders[entry.priority], entry)

    def is_started(self, row_id: RowId) -> bool:
        """Return whether the row was ever picked."""
        return self._entries[row_id].started

    @property
    def num_started(self) -> int:
        """The number of rows that hold device state."""
        return sum(self._num_started.values())

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[RowId]:
        return (entry.row_id for entry in chain.from_iterable(self._orders.values()))

    def __contains__(self, row_id: RowId) -> bool:
        return row_id in self._entries


def _take(step: _Step, entry: _Entry) -> _Step:
    step.entries.append(entry)
    step.tokens += entry.tokens
    return _reserve(step, entry)


def _reserve(step: _Step, entry: _Entry) -> _Step:
    step.num_new += not entry.started
    step.new_bytes += 0 if entry.started else entry.num_bytes
    step.num_new_batch += entry.priority == "batch" and not entry.started
    return step


def _take_on_second_queue(step: _Step, entry: _Entry) -> _Step:
    step.second_queue_frames += entry.work.frames
    return _take(step, entry)
