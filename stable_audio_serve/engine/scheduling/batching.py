"""Splits the clips of a denoising step into device calls and chooses the shape of each call: its batch size and padded
length. There are few shapes, so that a CUDA graph can be captured for each.
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
    """The size of a clip in a call: `branches` rows of the network's batch (2 if guided) of `frames` latent frames."""

    branches: int
    frames: int


@dataclass(frozen=True, slots=True)
class Call:
    """One device call for the lanes (clips) with the indices `members`. Its batch size `rows` includes dummy rows, and
    its length `frames` includes padding.

    A packed call concatenates its rows instead of padding them: `lengths` are the latent frames of each row of the
    batch, and `frames` is the longest. If it runs as a CUDA graph, it has the fixed capacity `room`, of which
    `num_spare` tokens are unused.
    """

    members: tuple[int, ...]
    rows: int
    frames: int
    lengths: tuple[int, ...] = ()
    room: PackedRoom | None = None
    num_spare: int = 0

    @property
    def groups(self) -> Groups:
        """The rows from which the call's time is predicted, as pairs (number of rows, frames of each). For this, the
        unused tokens of a packed call are added to its rows in equal parts.
        """
        if not self.lengths:
            return ((self.rows, self.frames),)
        longer = -(-self.num_spare // len(self.lengths))
        return tuple((rows, frames + longer) for frames, rows in Counter(self.lengths).items())


class BatchPolicy(Protocol):
    """Splits a denoising step into calls. Each lane (clip) is in exactly one call, which has at least its length."""

    def split(self, lanes: Sequence[Lane]) -> list[Call]: ...

    def padded(self, frames: int) -> int:
        """Return the length, padding included, of a call for one row of `frames` latent frames."""
        ...

    def typical_rows(self, branches: int, frames: int) -> int:
        """Return the batch size of a typical call with a clip of this size while many clips wait."""
        ...


def _by_length(lanes: Sequence[Lane], padded: Callable[[int], int]) -> dict[int, list[int]]:
    """Return the indices of the lanes by padded length. The order of the lanes is kept."""
    groups: dict[int, list[int]] = {}
    for i, lane in enumerate(lanes):
        groups.setdefault(padded(lane.frames), []).append(i)
    return groups


@dataclass(frozen=True, slots=True)
class OneRowPerCall:
    """Strict mode on a CPU: each clip has its own calls, whose length is padded to a multiple of `grid`."""

    grid: int = 1

    def split(self, lanes: Sequence[Lane]) -> list[Call]:
        return [Call((i,), lane.branches, self.padded(lane.frames)) for i, lane in enumerate(lanes)]

    def typical_rows(self, branches: int, frames: int) -> int:
        return branches

    def padded(self, frames: int) -> int:
        return round_up(frames, self.grid)


@dataclass(frozen=True, slots=True)
class FixedSlots:
    """Strict mode on CUDA: each call has the batch size `slots` and one padded length; dummy rows fill the batch up."""

    slots: int = 8
    grid: int = 64

    def split(self, lanes: Sequence[Lane]) -> list[Call]:
        """Return calls in which only lanes of equal padded length share a call. The order of the lanes is kept."""
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
    """Return calls, padded to `frames`, for the lanes with the indices `members`.

    Both network rows of a guided lane are in the same call.
    """
    _, rooms = cut(shapes, call_ms, rows=sum(lanes[i].branches for i in members), frames=frames)
    groups: list[list[int]] = [[] for _ in rooms]
    # Lanes with two network rows (guided) are placed first, so that those with one fill the remaining gaps.
    for i in sorted(members, key=lambda i: -lanes[i].branches):
        place = next((place for place, room in enumerate(rooms) if room >= lanes[i].branches), len(rooms))
        if place == len(rooms):  # no call has room: each call of odd size may have one row left, and two are needed
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
    """Return the batch size, at least `branches`, of a call with about `knee_tokens` latent frames in all its rows."""
    rows = min(int(knee_tokens / frames), most_rows(shapes, frames))
    return max(shapes.most(rows), shapes.least(branches))


@dataclass(frozen=True, slots=True)
class MergedGrid:
    """Fast mode: clips of different lengths share a padded call if that is predicted to be faster than separate calls.

    `call_ms(rows, frames)` predicts a call's time. `knee_tokens(frames)` is how many latent frames a call needs in
    total for its fixed cost to be a small share of its time, if its rows have `frames` latent frames each.
    """

    call_ms: CallMs
    knee_tokens: Callable[[int], float]
    shapes: CallShapes

    def split(self, lanes: Sequence[Lane]) -> list[Call]:
        """Return the calls whose predicted times have the smallest sum."""
        by_length = _by_length(lanes, self.padded)
        lengths = sorted(by_length)
        rows = [sum(lanes[i].branches for i in by_length[length]) for length in lengths]
        call_ms = cache(self.call_ms)
        # Dynamic programming. best[stop] is for the shortest `stop` lengths: their least predicted ms, and the index of
        # the shortest length in their last group of calls.
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
    """Fast mode for a CPU: all clips share one call, which concatenates them without padding.

    `knee_tokens` is as in MergedGrid.
    """

    knee_tokens: Callable[[int], float]

    def split(self, lanes: Sequence[Lane]) -> list[Call]:
        """Return one call for all lanes, sorted by length. Returns no call if there are no lanes."""
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
    """Fast mode for devices where packed calls (clips concatenated without padding) can be captured as CUDA graphs.
    Clips are packed unless padded calls are predicted to be faster. A single clip is never packed. `groups_ms` predicts
    the time of a packed call.
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
        """Return packed calls for all lanes, of at most PACKED_ROWS network rows each. Requires at least one lane."""
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
    """Fast mode for a network that cannot mask padding: only clips of equal length share a call.

    `call_ms` and `knee_tokens` are as in MergedGrid. Of `shapes`, only the batch sizes are used.
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
