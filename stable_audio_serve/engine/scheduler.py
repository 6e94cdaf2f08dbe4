"""Decides which rows the engine works on next: pure bookkeeping that never sees a tensor or a device.

Every row has a deadline, arrival + slack x its predicted time alone, so short work passes long work but never
forever: the slack is bounded and a deadline never moves, so in time any row is the earliest. The earliest deadlines
fill a token budget per step. Equal work has deadlines in order of arrival and therefore runs first-come to
completion. Rotation over all rows would finish everything late and is what this module exists to avoid.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NewType

from stable_audio_serve.engine.work import RowWork

RowId = NewType("RowId", int)


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """Bounds of one pick; `max_tokens` 0 means one row at a time."""

    max_started: int = 64
    max_tokens: int = 16_384
    slack: float = 5.0
    max_slack_s: float = 120.0


@dataclass(slots=True, order=True)
class _Entry:
    deadline_at: float
    row_id: RowId  # ids rise with arrival, so that ties are first-come
    work: RowWork = field(compare=False)
    started: bool = field(default=False, compare=False)


class Scheduler:
    """Rows between admission and their end. Used by one thread; unknown ids raise KeyError.

    `knee_tokens(frames)` says how many latent frames make a step of such rows worth its fixed cost.
    """

    def __init__(self, limits: SchedulerLimits, *, knee_tokens: Callable[[int], float]) -> None:
        self._limits = limits
        self._knee_tokens = knee_tokens
        self._order: list[_Entry] = []
        self._entries: dict[RowId, _Entry] = {}
        self._num_started = 0

    def add(self, row_id: RowId, work: RowWork, *, arrived_at: float, alone_s: float) -> None:
        """Admit a row: `arrived_at` on the engine's clock, `alone_s` its predicted time on an idle engine."""
        if row_id in self._entries:
            raise ValueError(f"row {row_id} was already added")
        slack_s = min(self._limits.slack * alone_s, self._limits.max_slack_s)
        entry = _Entry(arrived_at + slack_s, row_id, work)
        self._entries[row_id] = entry
        insort(self._order, entry)

    def remove(self, row_id: RowId) -> None:
        """Forget a row that ended in any way."""
        entry = self._entries.pop(row_id)
        del self._order[bisect_left(self._order, entry)]
        self._num_started -= entry.started

    def pick(self) -> list[RowId]:
        """The rows to work on now, earliest deadline first; empty only when no row is left.

        Picked rows count as started until they are removed. While `max_started` rows are, no other row starts.
        """
        picked: list[RowId] = []
        budget = tokens = 0.0
        for entry in self._order:
            if not entry.started and self._num_started >= self._limits.max_started:
                continue
            if not picked:
                budget = self._budget(entry.work.frames)
            elif tokens >= budget or tokens + entry.work.tokens > self._limits.max_tokens:
                break
            self._num_started += not entry.started
            entry.started = True
            picked.append(entry.row_id)
            tokens += entry.work.tokens
        return picked

    def _budget(self, frames: int) -> float:
        """max(knee, a quarter of what waits), capped."""
        cap = self._limits.max_tokens
        if cap == 0:
            return 0.0
        waiting = 0
        for entry in self._order:
            waiting += entry.work.tokens
            if waiting >= 4 * cap:
                break
        return min(max(self._knee_tokens(frames), waiting / 4), cap)

    def position(self, row_id: RowId) -> int:
        """How many rows are ahead of this one."""
        return bisect_left(self._order, self._entries[row_id])

    def is_started(self, row_id: RowId) -> bool:
        """Whether the row was ever picked."""
        return self._entries[row_id].started

    @property
    def num_started(self) -> int:
        """Rows that hold device state."""
        return self._num_started

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[RowId]:
        return (entry.row_id for entry in self._order)

    def __contains__(self, row_id: RowId) -> bool:
        return row_id in self._entries
