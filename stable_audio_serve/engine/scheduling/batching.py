"""Splits picked rows into device calls and chooses each call's shape: its number of network rows and its padded length.
The shapes are few, so that a graph can be captured for each. No tensors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol

from stable_audio_serve.engine.scheduling.call_shapes import (
    PACKED_ROWS,
    CallMs,
    CallShapes,
    PackedRoom,
    PackedShapes,
    cut,
    most_rows,
    round_up,
)
from stable_audio_serve.engine.scheduling.cost import Groups


@dataclass(frozen=True, slots=True)
class Lane:
    """The size of a picked row: `branches` network rows (2 if guided) of `frames` latent frames each."""

    branches: int
    frames: int


@dataclass(frozen=True, slots=True)
class Call:
    """One device call. `members` are indices of lanes. `rows` includes dummy rows, `frames` includes padding.

    In a packed call no row is padded: `lengths` are the latent frames of each network row, and `frames` is the longest.
    A packed call that replays a graph has a fixed `room`, of which `num_spare` tokens are unused.
    """

    members: tuple[int, ...]
    rows: int
    frames: int
    lengths: tuple[int, ...] = ()
    room: PackedRoom | None = None
    num_spare: int = 0

    @property
    def groups(self) -> Groups:
        """The (rows, frames) groups from which the call's time is predicted. Packed rows share the spare tokens."""
        if not self.lengths:
            return ((self.rows, self.frames),)
        longer = -(-self.num_spare // len(self.lengths))
        return tuple((rows, frames + longer) for frames, rows in Counter(self.lengths).items())


class BatchPolicy(Protocol):
    """Splits a step into calls. Each lane is in exactly one call, padded to at least the lane's frames."""

    def split(self, lanes: Sequence[Lane]) -> list[Call]: ...

    def padded(self, frames: int) -> int:
        """Return the padded length of a call for a single row of `frames` latent frames."""
        ...

    def typical_rows(self, branches: int, frames: int) -> int:
        """Return the typical number of network rows in a call with a row of this size, when many rows wait."""
        ...


def _by_length(lanes: Sequence[Lane], padded: Callable[[int], int]) -> dict[int, list[int]]:
    """Group the indices of the lanes by padded length, in the order given."""
    groups: dict[int, list[int]] = {}
    for i, lane in enumerate(lanes):
        groups.setdefault(padded(lane.frames), []).append(i)
    return groups


@dataclass(frozen=True, slots=True)
class OneRowPerCall:
    """Strict mode on a CPU: a call's shape depends only on its row and the grid."""

    grid: int = 1

    def split(self, lanes: Sequence[Lane]) -> list[Call]:
        return [Call((i,), lane.branches, self.padded(lane.frames)) for i, lane in enumerate(lanes)]

    def typical_rows(self, branches: int, frames: int) -> int:
        return branches

    def padded(self, frames: int) -> int:
        return round_up(frames, self.grid)


@dataclass(frozen=True, slots=True)
class FixedSlots:
    """Strict mode on CUDA: a call has `slots` network rows, all of one padded length; unused slots are dummies."""

    slots: int = 8
    grid: int = 64

    def split(self, lanes: Sequence[Lane]) -> list[Call]:
        """Fill the calls of each padded length in the order given."""
        calls: list[Call] = []
        for frames, members in _by_length(lanes, self.padded).items():
            group: list[int] = []
            used = 0
            for i in members:
                if used + lanes[i].branches > self.slots:
                    calls.append(Call(tuple(group), self.slots, frames))
                    group, used = [], 0
                group.append(i)
                used += lanes[i].branches
            calls.append(Call(tuple(group), self.slots, frames))
        return calls

    def typical_rows(self, branches: int, frames: int) -> int:
        return self.slots

    def padded(self, frames: int) -> int:
        return round_up(frames, self.grid)


def _fill(
    shapes: CallShapes, call_ms: CallMs, *, lanes: Sequence[Lane], members: Sequence[int], frames: int
) -> list[Call]:
    """Return calls for these members, padded to `frames`. Both network rows of a guided lane are in the same call."""
    _, rooms = cut(shapes, call_ms, rows=sum(lanes[i].branches for i in members), frames=frames)
    groups: list[list[int]] = [[] for _ in rooms]
    for i in sorted(members, key=lambda i: -lanes[i].branches):  # guided rows first, so that unguided rows fill gaps
        place = next((place for place, room in enumerate(rooms) if room >= lanes[i].branches), len(rooms))
        if place == len(rooms):  # calls of odd size leave gaps of one row, too small for a guided row
            rooms.append(max(most_rows(shapes, frames), lanes[i].branches))
            groups.append([])
        groups[place].append(i)
        rooms[place] -= lanes[i].branches
    return [
        Call(tuple(sorted(group)), shapes.least(sum(lanes[i].branches for i in group)), frames)
        for group in groups
        if group
    ]


def _rows_near_knee(shapes: CallShapes, *, branches: int, frames: int, knee_tokens: float) -> int:
    """Return the number of network rows in a call of about `knee_tokens` latent frames in total."""
    rows = min(int(knee_tokens / frames), most_rows(shapes, frames))
    return max(shapes.most(rows), shapes.least(branches))


@dataclass(frozen=True, slots=True)
class MergedGrid:
    """Fast mode: rows of different lengths share a padded call if that is predicted to be faster than separate calls.

    `call_ms(rows, frames)` predicts a call's time. `knee_tokens(frames)` is the number of latent frames above which the
    fixed cost is a small share of a call.
    """

    call_ms: CallMs
    knee_tokens: Callable[[int], float]
    shapes: CallShapes

    def split(self, lanes: Sequence[Lane]) -> list[Call]:
        """Return the calls with the least predicted time in total. Lanes of equal padded length share calls."""
        by_length = _by_length(lanes, self.padded)
        lengths = sorted(by_length)
        rows = [sum(lanes[i].branches for i in by_length[length]) for length in lengths]
        call_ms = cache(self.call_ms)
        # best[stop] = (least predicted ms for the first `stop` lengths, index of the first length in the last call)
        best: list[tuple[float, int]] = [(0.0, 0)]
        for stop in range(1, len(lengths) + 1):
            candidates = [
                (best[start][0] + self._cut_ms(call_ms, rows=sum(rows[start:stop]), frames=lengths[stop - 1]), start)
                for start in range(stop)
            ]
            best.append(min(candidates))
        calls: list[Call] = []
        stop = len(lengths)
        while stop > 0:
            start = best[stop][1]
            members = [i for length in lengths[start:stop] for i in by_length[length]]
            frames = lengths[stop - 1]
            calls = _fill(self.shapes, call_ms, lanes=lanes, members=members, frames=frames) + calls
            stop = start
        return calls

    def _cut_ms(self, call_ms: CallMs, *, rows: int, frames: int) -> float:
        return cut(self.shapes, call_ms, rows=rows, frames=frames)[0]

    def typical_rows(self, branches: int, frames: int) -> int:
        return _rows_near_knee(self.shapes, branches=branches, frames=frames, knee_tokens=self.knee_tokens(frames))

    def padded(self, frames: int) -> int:
        return self.shapes.padded(frames)


@dataclass(frozen=True, slots=True)
class Packed:
    """Fast mode where a row costs only its own frames: all rows share one call, without padding.

    `knee_tokens` is as in MergedGrid.
    """

    knee_tokens: Callable[[int], float]

    def split(self, lanes: Sequence[Lane]) -> list[Call]:
        """Return one call with the lanes sorted by length, so that equal lengths are adjacent."""
        if not lanes:
            return []
        members = sorted(range(len(lanes)), key=lambda i: lanes[i].frames)
        lengths = tuple(lanes[i].frames for i in members for _ in range(lanes[i].branches))
        return [Call(tuple(members), len(lengths), lengths[-1], lengths)]

    def typical_rows(self, branches: int, frames: int) -> int:
        return max(branches, int(self.knee_tokens(frames) / frames))

    def padded(self, frames: int) -> int:
        return frames


@dataclass(frozen=True, slots=True)
class PackedOrGrid:
    """Fast mode where packed calls can be captured as graphs: rows are packed unless padded calls are predicted to be
    faster. A single row is never packed. `groups_ms` predicts the time of a call with several row lengths.
    """

    grid: MergedGrid
    shapes: PackedShapes
    groups_ms: Callable[[Groups], float]

    def split(self, lanes: Sequence[Lane]) -> list[Call]:
        padded = self.grid.split(lanes)
        if len(lanes) < 2:
            return padded
        packed = self.pack(lanes)
        return packed if self._ms(packed) < self._ms(padded) else padded

    def pack(self, lanes: Sequence[Lane]) -> list[Call]:
        """Return packed calls of at most PACKED_ROWS network rows each. Needs at least one lane."""
        calls: list[Call] = []
        members: list[int] = []
        lengths: list[int] = []
        for i in sorted(range(len(lanes)), key=lambda i: lanes[i].frames):
            if len(lengths) + lanes[i].branches > PACKED_ROWS:
                calls.append(self._call(members, lengths))
                members, lengths = [], []
            members.append(i)
            lengths += [lanes[i].frames] * lanes[i].branches
        return [*calls, self._call(members, lengths)]

    def _call(self, members: Sequence[int], lengths: Sequence[int]) -> Call:
        room = self.shapes.room(lengths)
        num_spare = room.tokens - sum(lengths) - self.shapes.prefix * len(lengths)
        return Call(tuple(members), room.rows, room.longest, tuple(lengths), room, num_spare)

    def _ms(self, calls: Sequence[Call]) -> float:
        return sum(self.groups_ms(call.groups) for call in calls)

    def typical_rows(self, branches: int, frames: int) -> int:
        return self.grid.typical_rows(branches, frames)

    def padded(self, frames: int) -> int:
        return self.grid.padded(frames)


@dataclass(frozen=True, slots=True)
class EqualLengths:
    """Fast mode for a network without a frame mask: only rows of equal length share a call, without padding.

    `call_ms` and `knee_tokens` are as in MergedGrid; only the row counts of `shapes` are used.
    """

    call_ms: CallMs
    knee_tokens: Callable[[int], float]
    shapes: CallShapes

    def split(self, lanes: Sequence[Lane]) -> list[Call]:
        return [
            call
            for frames, members in _by_length(lanes, self.padded).items()
            for call in _fill(self.shapes, self.call_ms, lanes=lanes, members=members, frames=frames)
        ]

    def typical_rows(self, branches: int, frames: int) -> int:
        return _rows_near_knee(self.shapes, branches=branches, frames=frames, knee_tokens=self.knee_tokens(frames))

    def padded(self, frames: int) -> int:
        return frames
