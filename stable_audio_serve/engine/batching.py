"""Splits the picked rows into device calls of fixed meaning: how many network rows, padded to how many latents.
Pure bookkeeping; which shapes exist is decided here so that a captured graph per shape can be replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Lane:
    """What one picked row needs of a call: `branches` network rows (2 when guided) of `frames` latents."""

    branches: int
    frames: int


@dataclass(frozen=True, slots=True)
class Call:
    """One device call: `members` are indices into the lanes, `rows` network rows with dummies, `frames` padded."""

    members: tuple[int, ...]
    rows: int
    frames: int


class BatchPolicy(Protocol):
    """Cuts a step into calls; every lane is in exactly one call, which is at least as long as the lane."""

    def split(self, lanes: Sequence[Lane]) -> list[Call]:
        """The calls of this step."""
        ...

    def padded(self, frames: int) -> int:
        """The length at which a lone row of `frames` latents runs."""
        ...

    def crowd(self, branches: int, frames: int) -> int:
        """How many network rows usually share the call of such a row when many wait."""
        ...


def round_up(value: int, multiple: int) -> int:
    """The least multiple of `multiple` that is not below `value`."""
    return -(-value // multiple) * multiple


@dataclass(frozen=True, slots=True)
class OneRowPerCall:
    """Strict on a CPU: a call's shape depends on its row and the grid only."""

    grid: int = 1

    def split(self, lanes: Sequence[Lane]) -> list[Call]:
        """One call per lane."""
        return [Call((i,), lane.branches, self.padded(lane.frames)) for i, lane in enumerate(lanes)]

    def crowd(self, branches: int, frames: int) -> int:
        """Its own branches: nobody shares."""
        return branches

    def padded(self, frames: int) -> int:
        """The row's own length on the grid."""
        return round_up(frames, self.grid)


@dataclass(frozen=True, slots=True)
class FixedSlots:
    """Strict on CUDA: always `slots` network rows, only rows of one grid length together, the rest dummies."""

    slots: int = 8
    grid: int = 64

    def split(self, lanes: Sequence[Lane]) -> list[Call]:
        """Lanes in order of arrival, filling the calls of their own length."""
        calls: list[Call] = []
        by_length: dict[int, list[int]] = {}
        for i, lane in enumerate(lanes):
            by_length.setdefault(self.padded(lane.frames), []).append(i)
        for frames, members in by_length.items():
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
        """All slots."""
        return self.slots

    def padded(self, frames: int) -> int:
        """The row's own length on the grid."""
        return round_up(frames, self.grid)


@dataclass(frozen=True, slots=True)
class MergedGrid:
    """Fast: rows of unlike length share a call where one padded call is predicted to beat two.

    `call_ms(rows, frames)` predicts a call, `knee_tokens(frames)` says how many latents make its fixed cost small.
    """

    call_ms: Callable[[int, int], float]
    knee_tokens: Callable[[int], float]
    grid: int = 64

    def split(self, lanes: Sequence[Lane]) -> list[Call]:
        """The cheapest cut of the lanes sorted by padded length; equal lengths always stay together."""
        by_length: dict[int, list[int]] = {}
        for i, lane in enumerate(lanes):
            by_length.setdefault(self.padded(lane.frames), []).append(i)
        lengths = sorted(by_length)
        rows = [sum(lanes[i].branches for i in by_length[length]) for length in lengths]
        # best[stop] = (predicted ms of the cheapest cut of the first `stop` lengths, where its last call begins)
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
        """As many as make the call's fixed cost small."""
        return max(branches, int(self.knee_tokens(frames) / frames))

    def padded(self, frames: int) -> int:
        """The row's own length on the grid."""
        return round_up(frames, self.grid)
