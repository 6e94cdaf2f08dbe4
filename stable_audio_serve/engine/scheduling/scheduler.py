"""Decides which rows the engine works on next. A row is one clip in the queue or in progress. The rows that are picked
together make a step. In a step, each row is encoded, denoised by one evaluation, or decoded.

Deadlines. The deadline of a row is its arrival time plus `slack` times its predicted time on an idle engine, but at
most `max_slack_s` after arrival. The deadline never changes. A short row therefore overtakes long ones, but no row is
overtaken forever. Round-robin would make all rows finish late.

Filling a step. Rows join a step in order of deadline until the step has enough latent frames to make its fixed cost
small (`knee_tokens`). If the queue is long, rows join until the step has a quarter of all waiting frames, because large
steps finish the queue sooner. A row that would fill the step far beyond this number does not join: all rows of a step
wait for it to end, so a long row would delay a short one. A step of several rows never has more than `max_tokens`
frames.

Starting rows. Started rows hold device memory, so their number is limited. If a row does not fit into memory, no later
row starts. Otherwise small rows could keep a large row waiting forever. Batch rows leave a quarter of the memory to
interactive rows, unless a single batch row needs more.

Batch rows. Rows of interactive priority run first. Each interactive step lends some device time to rows of batch
priority: `batch_share` of the step's own time. A batch row joins the step if the lent time covers the time that the row
adds. If the step is already too large, lent time accumulates until it covers a separate step for the batch row. An
interactive row is therefore delayed by at most `batch_share` of its time, plus one step, and batch rows progress under
any interactive load. Lent time is dropped when no batch row needs it. If a batch row waits for memory, no interactive
row starts from when the lent time covers a step of the batch row until it has started.

Second queue. On CUDA, rows are encoded or decoded on a second stream (queue) while other rows are denoised. Rows
on the second stream do not count towards the latent frames of the step.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field
from enum import Enum
from typing import NewType

from stable_audio_serve.core.generation import Priority
from stable_audio_serve.engine.scheduling.batching import Lane
from stable_audio_serve.models.protocol import RowPlan
from stable_audio_serve.models.windows import audible_spans, window_lengths

RowId = NewType("RowId", int)

# How many frames a step may have relative to the number from which it is full. Simulated for small-mixed on an H200:
# with 1.5, the p95 of 8-step clips is 0.063 of a lock server's and that of 100-step clips 1.37; with 1.25, 0.059 and
# 1.57; without a limit, 0.081 and 1.11.
_OVERFILL = 1.5


class Phase(Enum):
    """The kind of work that is done for a row when it is picked next."""

    ENCODE = "encode"
    DENOISE = "denoise"
    DECODE = "decode"
    DONE = "done"


@dataclass(slots=True, eq=False)
class RowWork:
    """The remaining work of one row (clip) of `frames` latent frames. The engine's loop updates it.

    `encode_left` and `decode_left` have the lengths of the windows that are not encoded or decoded yet. `branches` has
    one number per evaluation: how many rows of the network's batch it takes, 2 if guided, else 1. `guided_left` is the
    number of guided evaluations that are not done. `is_adapted` says whether adapters apply to the evaluations.
    """

    frames: int
    _: KW_ONLY
    branches: Sequence[int]
    encode_left: Sequence[int] = ()
    decode_left: Sequence[int] = ()
    is_adapted: bool = False
    num_done: int = field(default=0, init=False)
    guided_left: int = field(init=False)

    def __post_init__(self) -> None:
        self.guided_left = sum(n == 2 for n in self.branches)

    @classmethod
    def of(cls, plan: RowPlan, *, hop: int, is_adapted: bool = False) -> RowWork:
        """Return all work of a row that has not started. `is_adapted` says whether adapters apply to the row."""
        sources = [source for source in (plan.init_source, plan.inpaint_source) if source is not None]
        end = min(plan.output_samples, plan.valid_frames * hop)
        return cls(
            plan.frames,
            branches=[2 if evaluation.guided else 1 for evaluation in plan.sampler.evaluations],
            encode_left=[frames for source in sources for frames in window_lengths(source.windows)],
            decode_left=window_lengths(audible_spans(plan.decode_windows, hop=hop, end=end)),
            is_adapted=is_adapted,
        )

    @property
    def phase(self) -> Phase:
        """The current phase; phases run in the order of the enum."""
        if self.encode_left:
            return Phase.ENCODE
        if self.num_done < len(self.branches):
            return Phase.DENOISE
        return Phase.DECODE if self.decode_left else Phase.DONE

    @property
    def lane(self) -> Lane:
        """The size of the next evaluation: its number of network rows and latent frames."""
        return Lane(self.branches[self.num_done], self.frames)

    @property
    def tokens(self) -> int:
        """How many latent frames the row adds to a step if it is picked now."""
        if self.phase is Phase.DENOISE:
            return self.frames * self.branches[self.num_done]
        return self.frames

    def finish_evaluation(self) -> None:
        """Count one evaluation as done."""
        self.guided_left -= self.branches[self.num_done] == 2
        self.num_done += 1


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """How many rows may run. If `max_tokens` is 0, rows are picked one at a time."""

    # How many rows may be in progress at the same time; at least 2. A quarter of this number (at least one) is reserved
    # for interactive rows, and one for batch rows. Of `max_bytes`, a quarter is reserved for interactive rows.
    max_started: int = 64
    max_tokens: int = 16_384
    slack: float = 6.0
    max_slack_s: float = 120.0
    batch_share: float = 0.125
    max_bytes: int | None = None  # the device memory of all rows in progress; None: no limit


@dataclass(slots=True, order=True)
class _Entry:
    deadline_at: float
    row_id: RowId  # ids increase, so that rows of equal deadline are ordered by arrival
    work: RowWork = field(compare=False)
    priority: Priority = field(compare=False)
    tokens: int = field(compare=False)  # the number that `Scheduler._waiting_tokens` includes for this row
    num_bytes: int = field(compare=False)
    started: bool = field(default=False, compare=False)


@dataclass(slots=True)
class _Step:
    """A step that is being filled. `num_started` and `started_bytes` count all started rows, by priority. They include
    the rows that this step starts.
    """

    num_started: dict[Priority, int]
    started_bytes: dict[Priority, int]
    entries: list[_Entry] = field(default_factory=list)
    tokens: float = 0.0
    second_queue_frames: float = 0.0  # latent frames of the rows that are encoded or decoded during the step
    is_full: bool = False  # no later row is denoised in this step
    waits_for_memory: bool = False  # a row does not fit into memory, so no later row may start
    waits_for_second_queue: bool = False  # a row would be encoded or decoded, but the second queue may not be used

    @property
    def works(self) -> list[RowWork]:
        return [entry.work for entry in self.entries]

    @property
    def num_new(self) -> int:
        """How many rows this step starts."""
        return sum(not entry.started for entry in self.entries)

    def take(self, entry: _Entry, *, on_second_queue: bool = False) -> None:
        """Add a row to the step."""
        self.entries.append(entry)
        self.tokens += entry.tokens
        self.second_queue_frames += entry.work.frames if on_second_queue else 0
        self.reserve(entry)

    def reserve(self, entry: _Entry) -> None:
        """Count a row as started, so that no later row takes its memory."""
        if not entry.started:
            self.num_started[entry.priority] += 1
            self.started_bytes[entry.priority] += entry.num_bytes


class Scheduler:
    """Holds all rows from `add` to `remove`, and picks the rows to run next. Used by one thread.

    Between two calls of `pick`, only the `work` of the picked rows may change. Methods raise KeyError for unknown ids.
    """

    def __init__(
        self,
        limits: SchedulerLimits,
        *,
        knee_tokens: Callable[[int], float],
        step_ms: Callable[[Sequence[RowWork], int], float],
        has_second_queue: bool = False,
    ) -> None:
        """`knee_tokens(frames)` predicts how many latent frames a step of rows of `frames` latent frames needs in
        total, so that its fixed cost is small. `step_ms(works, num_new)` predicts the time of a step of rows with the
        remaining work `works`, `num_new` of which start in this step. With `has_second_queue`, rows are encoded or
        decoded while other rows are denoised.
        """
        self._has_second_queue = has_second_queue
        self._limits = limits
        self._knee_tokens = knee_tokens
        self._step_ms = step_ms
        self._orders: dict[Priority, list[_Entry]] = {"interactive": [], "batch": []}
        self._entries: dict[RowId, _Entry] = {}
        self._num_started: dict[Priority, int] = dict.fromkeys(self._orders, 0)
        self._started_bytes: dict[Priority, int] = dict.fromkeys(self._orders, 0)
        self._saves_memory = False  # no interactive row starts, so that a batch row gets its memory
        self._waiting_tokens: dict[Priority, int] = dict.fromkeys(self._orders, 0)
        self._picked: list[_Entry] = []
        self._lent_ms = 0.0  # device time that interactive steps lent to batch rows, and that is not used yet

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
        """Add a row that arrived at time `arrived_at` (the engine's clock).

        `alone_s` is the predicted time of the row on an idle engine. The row needs `num_bytes` of device memory from
        its first pick until it is removed.
        """
        if row_id in self._entries:
            raise ValueError(f"row {row_id} was already added")
        slack_s = min(self._limits.slack * alone_s, self._limits.max_slack_s)
        entry = _Entry(arrived_at + slack_s, row_id, work, priority, self._tokens(work), num_bytes)
        self._entries[row_id] = entry
        self._waiting_tokens[priority] += entry.tokens
        insort(self._orders[priority], entry)

    def remove(self, row_id: RowId) -> None:
        """Remove a row, which need not have finished."""
        entry = self._entries.pop(row_id)
        order = self._orders[entry.priority]
        del order[bisect_left(order, entry)]
        self._num_started[entry.priority] -= entry.started
        self._started_bytes[entry.priority] -= entry.num_bytes if entry.started else 0
        self._waiting_tokens[entry.priority] -= entry.tokens

    def pick(self, *, use_second_queue: bool = True) -> list[RowId]:
        """Return the ids of the rows to run now, ordered by priority and then by deadline. If there are rows, at least
        one is picked.

        With `use_second_queue` False, rows that would be encoded or decoded on the second queue are not picked, so the
        result may be empty although there are rows.

        A row starts when it is first picked, and counts as started until it is removed. A row starts only if fewer than
        `max_started` rows are started and enough memory is free. If a row waits for memory, no later row starts.
        """
        self._update_waiting_tokens()
        saves_memory, self._saves_memory = self._saves_memory, False
        step = self._fill("interactive", use_second_queue=use_second_queue, waits_for_memory=saves_memory)
        step.waits_for_memory &= not saves_memory  # the batch row may start as soon as it fits
        if step.entries or step.waits_for_second_queue:
            step = self._lend(step, use_second_queue=use_second_queue)
        else:
            self._lent_ms = 0.0
            step = self._fill("batch", use_second_queue=use_second_queue, waits_for_memory=step.waits_for_memory)
        for entry in step.entries:
            self._num_started[entry.priority] += not entry.started
            self._started_bytes[entry.priority] += 0 if entry.started else entry.num_bytes
            entry.started = True
        self._picked = step.entries
        return [entry.row_id for entry in step.entries]

    def _update_waiting_tokens(self) -> None:
        """Update the number of waiting latent frames after the work of the rows of the last pick."""
        for entry in self._picked:
            if self._entries.get(entry.row_id) is entry:
                tokens = self._tokens(entry.work)
                self._waiting_tokens[entry.priority] += tokens - entry.tokens
                entry.tokens = tokens

    def _uses_second_queue(self, work: RowWork) -> bool:
        return self._has_second_queue and work.phase is not Phase.DENOISE

    def _tokens(self, work: RowWork) -> int:
        """Return how many latent frames a row with this work adds to a step; 0 if the second queue does the work."""
        return 0 if self._uses_second_queue(work) else work.tokens

    def _step(self, *, waits_for_memory: bool = False) -> _Step:
        return _Step(self._num_started.copy(), self._started_bytes.copy(), waits_for_memory=waits_for_memory)

    def _fill(self, priority: Priority, *, use_second_queue: bool, waits_for_memory: bool = False) -> _Step:
        """Return a step with as many rows of one priority as the limits for denoising, memory and the second queue
        allow.

        With `waits_for_memory`, an earlier row waits for memory, so no row may start.
        """
        step, budget, second_budget = self._step(waits_for_memory=waits_for_memory), 0.0, 0.0
        for entry in self._runnable(priority, step=step):
            if self._uses_second_queue(entry.work):
                step.waits_for_second_queue |= not use_second_queue
                second_budget = second_budget or self._budget(priority, entry.work.frames)
                if use_second_queue and (not step.second_queue_frames or step.second_queue_frames < second_budget):
                    step.take(entry, on_second_queue=True)
                else:
                    step.reserve(entry)
            elif not step.is_full:
                budget = budget or self._budget(priority, entry.work.frames)
                most = min(_OVERFILL * budget, self._limits.max_tokens)
                step.is_full = step.tokens > 0 and (step.tokens >= budget or step.tokens + entry.tokens > most)
                if not step.is_full:
                    step.take(entry)
        return step

    def _runnable(self, priority: Priority, *, step: _Step) -> Iterator[_Entry]:
        """Yield the rows of one priority that have started or may start, in order of deadline.

        If the step is full or a row may not start, ends after the last started row, which may be on the second queue.
        Ends at once if the step is full and there is no second queue.
        """
        num_left = self._num_started[priority]  # how many started rows are still to come
        for entry in self._orders[priority]:
            may_run = self._may_run(entry, step=step)
            if may_run:
                num_left -= entry.started
                yield entry
            if step.is_full and not self._has_second_queue:
                return
            if (step.is_full or not may_run) and not num_left:
                return

    def _lend(self, step: _Step, *, use_second_queue: bool) -> _Step:
        """Add batch rows to an interactive step, as long as lent time covers the device time that they add.

        Returns the step. If a batch row does not fit into it, and lent time covers a separate step, returns a step of
        this batch row alone instead.
        """
        if not self._orders["batch"]:
            self._lent_ms = 0.0
            return step
        ms = self._step_ms(step.works, step.num_new)
        share_ms = self._limits.batch_share * ms
        joined_ms = 0.0  # lent time that rows which join this step use
        for entry in self._orders["batch"]:
            is_second = self._uses_second_queue(entry.work)
            if not self._may_run(entry, step=step) or (is_second and not use_second_queue):
                continue
            new = int(not entry.started)
            if is_second or step.tokens + entry.tokens <= self._limits.max_tokens:
                added_ms = self._step_ms([*step.works, entry.work], step.num_new + new) - ms
                if added_ms > self._lent_ms + share_ms:
                    break
                self._lent_ms -= max(0.0, added_ms)
                joined_ms += max(0.0, added_ms)
                ms += added_ms
                step.take(entry, on_second_queue=is_second)
            else:
                alone_ms = self._step_ms([entry.work], new)
                if alone_ms > self._lent_ms:
                    break
                self._lent_ms += joined_ms - alone_ms  # the rows that would have joined run later
                alone = self._step()
                alone.take(entry)
                return alone
        else:
            self._limit_lent_time(step, share_ms=share_ms)
            return step
        self._lent_ms += share_ms
        return step

    def _limit_lent_time(self, step: _Step, *, share_ms: float) -> None:
        """Drop lent time that no batch row needs. If the first batch row waits for memory, it needs a step of its own,
        and gets its memory next when lent time covers this step.
        """
        unstarted = next((entry for entry in self._orders["batch"] if not entry.started), None)
        if unstarted is None or not step.waits_for_memory:
            self._lent_ms = 0.0
            return
        needed_ms = self._step_ms([unstarted.work], 1)
        self._lent_ms = min(self._lent_ms + share_ms, needed_ms)
        self._saves_memory = self._lent_ms >= needed_ms

    def _may_run(self, entry: _Entry, *, step: _Step) -> bool:
        """Return whether a row has already started or may start now.

        It may start if the limit of started rows is not reached and enough memory is free.
        """
        if entry.started:
            return True
        if (max_bytes := self._limits.max_bytes) is not None:
            taken, batch_bytes = sum(step.started_bytes.values()), step.started_bytes["batch"]
            if taken and taken + entry.num_bytes > max_bytes:
                step.waits_for_memory = True
            if step.waits_for_memory:
                return False
            if entry.priority == "batch" and batch_bytes and batch_bytes + entry.num_bytes > max_bytes - max_bytes // 4:
                return False
        most, num_batch = self._limits.max_started, step.num_started["batch"]
        num_started = sum(step.num_started.values())
        if entry.priority == "batch":
            return num_batch < most - max(most // 4, 1) and num_started < most
        reserves_batch_slot = not num_batch and bool(self._orders["batch"])
        return num_started < most - reserves_batch_slot

    def _budget(self, priority: Priority, frames: int) -> float:
        """Return how many latent frames to put into a step of this priority, whose first row has `frames` latent
        frames.
        """
        cap = self._limits.max_tokens
        if cap == 0:
            return 0.0
        return min(max(self._knee_tokens(frames), self._waiting_tokens[priority] / 4), cap)

    def position(self, row_id: RowId) -> int:
        """Return how many rows are ahead of this row in the queue. All interactive rows are ahead of a batch row."""
        entry = self._entries[row_id]
        ahead = len(self._orders["interactive"]) if entry.priority == "batch" else 0
        return ahead + bisect_left(self._orders[entry.priority], entry)

    def __contains__(self, row_id: RowId) -> bool:
        return row_id in self._entries
