"""Splits the picked rows into device calls: how many network rows, padded to how many latent frames.
Pure bookkeeping. All call shapes are chosen here, so that a graph can be captured and replayed for each shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Lane:
    """What one picked row needs in a call: `branches` network rows (2 when guided) of `frames` latent frames."""

    branches: int
    frames: int


@dataclass(frozen=True, slots=True)
class Call:
    """One device call. `members` index the lanes; `rows` includes dummies, `frames` padding.

    A packed call has no padding: `lengths` are the latent frames of each of its rows, `frames` those of the longest.
    """

    members: tuple[int, ...]
    rows: int
    frames: int
    lengths: tuple[int, ...] = ()

    @property
    def shape(self) -> tuple[int, int]:
        """The (rows, frames) to predict the call's time from: packed rows count as equal ones of as many frames."""
        return self.rows, -(-sum(self.lengths) // self.rows) if self.lengths else self.frames


class BatchPolicy(Protocol):
    """Splits a step into calls. Every lane is in exactly one call, which is at least as long as the lane."""

    def split(self, lanes: Sequence[Lane]) -> list[Call]:
        """Returns the calls of this step."""
        ...

    def padded(self, frames: int) -> int:
        """Returns the padded length of a call for a single row of `frames` latent frames."""
        ...

    def crowd(self, branches: int, frames: int) -> int:
        """Returns how many network rows usually share such a row's call when many rows wait."""
        ...


def round_up(value: int, multiple: int) -> int:
    """Returns the smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple


def _by_length(lanes: Sequence[Lane], padded: Callable[[int], int]) -> dict[int, list[int]]:
    """Returns the indices of the lanes of each padded length, in the order given."""
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

    def crowd(self, branches: int, frames: int) -> int:
        return branches

    def padded(self, frames: int) -> int:
        return round_up(frames, self.grid)


@dataclass(frozen=True, slots=True)
class FixedSlots:
    """Strict mode on CUDA: a call has `slots` network rows, all of one padded length; unused slots are dummies."""

    slots: int = 8
    grid: int = 64

    def split(self, lanes: Sequence[Lane]) -> list[Call]:
        """Lanes fill the calls of their padded length in the order given."""
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

    def crowd(self, branches: int, frames: int) -> int:
        return self.slots

    def padded(self, frames: int) -> int:
        return round_up(frames, self.grid)


@dataclass(frozen=True, slots=True)
class MergedGrid:
    """Fast mode: rows of different lengths share a call where one padded call is predicted to be faster than two.

    `call_ms(rows, frames)` predicts a call's time. `knee_tokens(frames)` returns the number of latent frames above
    which a call's fixed cost is a small share of it.
    """

    call_ms: Callable[[int, int], float]
    knee_tokens: Callable[[int], float]
    grid: int = 64

    def split(self, lanes: Sequence[Lane]) -> list[Call]:
        """Returns the split with the least predicted time; lanes of equal padded length share a call."""
        by_length = _by_length(lanes, self.padded)
        lengths = sorted(by_length)
        rows = [sum(lanes[i].branches for i in by_length[length]) for length in lengths]
        # best[stop] = (least predicted ms for the first `stop` lengths, where the last call of that split begins)
        best: list[tuple[float, int]] = [(0.0, 0)]
        for stop in range(1, len(lengths) + 1):
            candidates = [
                (best[start][0] + self.call_ms(sum(rows[start:stop]), lengths[stop - 1]), start)
                for start in range(stop)
            ]
            best.append(min(candidates))
        calls: list[Call] = []
        stop = len(lengths)
        while stop > 0:
            start = best[stop][1]
            members = sorted(i for length in lengths[start:stop] for i in by_length[length])
            calls.append(Call(tuple(members), sum(rows[start:stop]), lengths[stop - 1]))
            stop = start
        return calls[::-1]

    def crowd(self, branches: int, frames: int) -> int:
        return max(branches, int(self.knee_tokens(frames) / frames))

    def padded(self, frames: int) -> int:
        return round_up(frames, self.grid)


@dataclass(frozen=True, slots=True)
class Packed:
    """Fast mode where rows cost nothing but their own frames: all share one call, without padding.

    `knee_tokens` as in MergedGrid.
    """

    knee_tokens: Callable[[int], float]

    def split(self, lanes: Sequence[Lane]) -> list[Call]:
        """Returns one call; equal lengths lie side by side in it."""
        if not lanes:
            return []
        members = sorted(range(len(lanes)), key=lambda i: lanes[i].frames)
        lengths = tuple(lanes[i].frames for i in members for _ in range(lanes[i].branches))
        return [Call(tuple(members), len(lengths), lengths[-1], lengths)]

    def crowd(self, branches: int, frames: int) -> int:
        return max(branches, int(self.knee_tokens(frames) / frames))

    def padded(self, frames: int) -> int:
        return frames


@dataclass(frozen=True, slots=True)
class EqualLengths:
    """Fast mode for a network that knows no invalid frames: only rows of one length share a call, without padding.

    `knee_tokens` as in MergedGrid.
    """

    knee_tokens: Callable[[int], float]

    def split(self, lanes: Sequence[Lane]) -> list[Call]:
        groups = _by_length(lanes, self.padded)
        return [Call(tuple(i), sum(lanes[j].branches for j in i), frames) for frames, i in groups.items()]

    def crowd(self, branches: int, frames: int) -> int:
        return max(branches, int(self.knee_tokens(frames) / frames))

    def padded(self, frames: int) -> int:
        return frames
