"""Decides which clips share a device call in a denoising step, and which shape each call has. There are few shapes, so
that a CUDA graph can be captured for each. The shape of a padded call is its batch size and length. The shape of a
packed call, which concatenates clips without padding, is its capacity.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol

from stable_audio_serve.engine.scheduling.cost import Groups
from stable_audio_serve.models.windows import round_up

CallMs = Callable[[int, int], float]  # predicts the time of a call, from its batch size and its padded length

# The allowed batch sizes of the network. There are few, because each call shape needs a CUDA graph. Powers of two alone
# would be too few: 15 % of all rows would be dummy rows, which fill up a batch.
GRAPH_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
# Pairs (longest, multiple) in units of the grid. A row of at most `longest` is padded to a multiple of `multiple`, by
# the first pair that fits. Rows longer than all pairs are padded to a multiple of `_COARSEST`. Rows longer than the
# first pair grow by at most an eighth.
_GROWTH = ((16, 1), (32, 2))
_COARSEST = 4
# The capacity of a packed call, in rows and tokens. The capacity in rows is the smallest of PACKED_ROWS that is
# sufficient: unused rows take little time, but their latents are processed. The capacity in tokens is the needed number
# rounded up, by at most an eighth and on average a sixteenth. Small numbers are rounded up more, because a small call
# spends most of its time reading the weights.
PACKED_ROWS = (2, 8, 64)
_LEAST_STEP, _STEPS_PER_OCTAVE = 64, 8
_SHORT = 4  # packed calls have separate shapes for clips of at most 1/4 of the longest length


@dataclass(frozen=True, slots=True)
class Lane:
    """The size of a clip in a call: it takes `branches` rows of the network's batch (2 if guided), each of `frames`
    latent frames.
    """

    branches: int
    frames: int


@dataclass(frozen=True, slots=True)
class Call:
    """One device call for the lanes (clips) with the indices `members`.

    The batch size `rows` includes dummy rows, and the length `frames` includes padding.

    A packed call concatenates its rows instead of padding them. `lengths` has the latent frames of each row, and
    `frames` is the length of the longest row. If a packed call can run as a CUDA graph, `rows`, `frames` and `tokens`
    are capacities, and `num_spare` of the tokens are unused.
    """

    members: tuple[int, ...]
    rows: int
    frames: int
    lengths: tuple[int, ...] = ()
    tokens: int = 0
    num_spare: int = 0

    @property
    def groups(self) -> Groups:
        """The rows from which the call's time is predicted, as pairs (number of rows, frames of each row).

        The frames of a row include its share of the call's unused tokens.
        """
        if not self.lengths:
            return ((self.rows, self.frames),)
        longer = -(-self.num_spare // len(self.lengths))
        return tuple((rows, frames + longer) for frames, rows in Counter(self.lengths).items())


class BatchPolicy(Protocol):
    """Splits a denoising step into calls. Each lane (clip) is in exactly one call. A call is at least as long as each
    of its lanes.
    """

    def split(self, lanes: Sequence[Lane]) -> list[Call]: ...

    def padded(self, frames: int) -> int:
        """Return the length, padding included, of a call for one row of `frames` latent frames."""
        ...

    def typical_rows(self, branches: int, frames: int) -> int:
        """Return the batch size of a typical call when many clips of this size are waiting."""
        ...


def _by_length(lanes: Sequence[Lane], padded: Callable[[int], int]) -> dict[int, list[int]]:
    """Group the indices of the lanes by padded length. The indices of a group are in ascending order."""
    groups: dict[int, list[int]] = {}
    for i, lane in enumerate(lanes):
        groups.setdefault(padded(lane.frames), []).append(i)
    return groups


def _groups(lanes: Sequence[Lane], members: Iterable[int], *, capacity: int) -> list[list[int]]:
    """Divide the lanes with the indices `members`, in this order, into groups of at most `capacity` network rows."""
    groups: list[list[int]] = []
    left = 0
    for i in members:
        if lanes[i].branches > left:
            groups.append([])
            left = capacity
        groups[-1].append(i)
        left -= lanes[i].branches
    return groups


def _row_lengths(lanes: Sequence[Lane], members: Iterable[int]) -> tuple[int, ...]:
    """Return the latent frames of each network row of the lanes with the indices `members`."""
    return tuple(lanes[i].frames for i in members for _ in range(lanes[i].branches))


@dataclass(frozen=True, slots=True)
class OneRowPerCall:
    """Strict mode on a CPU: each clip has a call of its own, padded to a multiple of `grid` latent frames."""

    grid: int = 1

    def split(self, lanes: Sequence[Lane]) -> list[Call]:
        return [Call((i,), lane.branches, self.padded(lane.frames)) for i, lane in enumerate(lanes)]

    def typical_rows(self, branches: int, frames: int) -> int:
        return branches

    def padded(self, frames: int) -> int:
        return round_up(frames, self.grid)


@dataclass(frozen=True, slots=True)
class FixedSlots:
    """Strict mode on CUDA: all calls have the batch size `slots`, and dummy rows fill up the batch.

    All clips of a call have the same padded length, a multiple of `grid` latent frames.
    """

    slots: int = 8
    grid: int = 64

    def split(self, lanes: Sequence[Lane]) -> list[Call]:
        """Return calls for all lanes. Only lanes of equal padded length share a call, in the order of `lanes`."""
        return [
            Call(tuple(group), self.slots, frames)
            for frames, members in _by_length(lanes, self.padded).items()
            for group in _groups(lanes, members, capacity=self.slots)
        ]

    def typical_rows(self, branches: int, frames: int) -> int:
        return self.slots

    def padded(self, frames: int) -> int:
        return round_up(frames, self.grid)


@dataclass(frozen=True, slots=True)
class AnyRows:
    """The allowed shapes of calls without CUDA graphs: any batch size, and a length that is a multiple of `grid`.

    All rows of a call together have at most `max_tokens` latent frames, unless the batch size is 1.
    """

    grid: int = 1
    max_tokens: int = 16_384

    def padded(self, frames: int) -> int:
        """Return the padded length of a row of `frames` latent frames."""
        return round_up(frames, self.grid)

    def least(self, rows: int) -> int:
        """Return the smallest allowed batch size for this many rows. It includes dummy rows."""
        return rows

    def most(self, rows: int) -> int:
        """Return the largest allowed batch size that is at most this many rows; 0 if there is none."""
        return rows

    def most_rows(self, frames: int) -> int:
        """Return the largest allowed batch size of a call with rows padded to `frames` latent frames; at least 1."""
        return max(self.most(self.max_tokens // frames), 1)

    def cut(self, rows: int, frames: int, *, call_ms: CallMs) -> tuple[float, list[int]]:
        """Split `rows` rows, padded to `frames`, into calls. Returns the total predicted ms and the batch sizes.

        Calls of the largest batch size come first. For the remaining rows there is either one call with dummy rows or
        several smaller calls, whichever is predicted to be faster.
        """
        full = self.most_rows(frames)
        num_full, left = divmod(rows, full)
        ms, sizes = (num_full * call_ms(full, frames) if num_full else 0.0), [full] * num_full
        if left:
            left_ms, left_sizes = self._cut_rest(left, frames, call_ms=call_ms)
            ms, sizes = ms + left_ms, sizes + left_sizes
        return ms, sizes

    def _cut_rest(self, rows: int, frames: int, *, call_ms: CallMs) -> tuple[float, list[int]]:
        padded = self.least(rows)
        padded_ms = call_ms(padded, frames)
        if padded == rows:
            return padded_ms, [padded]
        first = self.most(rows)
        rest_ms, rest = self._cut_rest(rows - first, frames, call_ms=call_ms)
        cut_ms = call_ms(first, frames) + rest_ms
        return (cut_ms, [first, *rest]) if cut_ms < padded_ms else (padded_ms, [padded])


@dataclass(frozen=True, slots=True)
class GraphShapes(AnyRows):
    """The allowed shapes of calls that run as CUDA graphs. The batch size is one of `rows` (ascending from 1).

    Rows are padded to a multiple of `grid`, and long rows to a multiple of 2 or 4 times `grid`. A call has at most
    `max_tokens` latent frames, dummy rows and padding included, unless its batch size is 1.
    """

    grid: int = 64
    rows: tuple[int, ...] = GRAPH_ROWS

    def padded(self, frames: int) -> int:
        for num_steps, factor in _GROWTH:
            if frames <= num_steps * self.grid:
                return round_up(frames, factor * self.grid)
        return round_up(frames, _COARSEST * self.grid)

    def least(self, rows: int) -> int:
        return self.rows[bisect_left(self.rows, rows)]

    def most(self, rows: int) -> int:
        index = bisect_right(self.rows, rows)
        return self.rows[index - 1] if index else 0


@dataclass(frozen=True, slots=True)
class EqualLengths:
    """Fast mode for a network that cannot mask padding: only clips of equal length share a call.

    `call_ms(rows, frames)` predicts a call's time. `knee_tokens(frames)` predicts how many latent frames a call of rows
    of `frames` latent frames needs in total, so that its fixed cost is a small share of its time. `shapes` has the
    allowed batch sizes; its padding is not used.
    """

    call_ms: CallMs
    knee_tokens: Callable[[int], float]
    shapes: AnyRows

    def split(self, lanes: Sequence[Lane]) -> list[Call]:
        groups = _by_length(lanes, self.padded)
        return [call for frames, members in groups.items() for call in self._fill(lanes, members, frames=frames)]

    def typical_rows(self, branches: int, frames: int) -> int:
        rows = min(int(self.knee_tokens(frames) / frames), self.shapes.most_rows(frames))
        return max(self.shapes.most(rows), self.shapes.least(branches))

    def padded(self, frames: int) -> int:
        return frames

    def _fill(self, lanes: Sequence[Lane], members: Sequence[int], *, frames: int) -> list[Call]:
        """Return calls, padded to `frames`, for the lanes with the indices `members`.

        Both network rows of a guided lane are in the same call.
        """
        _, rooms = self.shapes.cut(sum(lanes[i].branches for i in members), frames, call_ms=self.call_ms)
        groups: list[list[int]] = [[] for _ in rooms]
        # Lanes with two network rows (guided) are placed first, so that lanes with one row fill the remaining gaps.
        for i in sorted(members, key=lambda i: -lanes[i].branches):
            place = next((place for place, room in enumerate(rooms) if room >= lanes[i].branches), len(rooms))
            if place == len(rooms):  # each call of odd size may have one row left, and two are needed
                rooms.append(max(self.shapes.most_rows(frames), lanes[i].branches))
                groups.append([])
            groups[place].append(i)
            rooms[place] -= lanes[i].branches
        return [
            Call(tuple(sorted(group)), self.shapes.least(sum(lanes[i].branches for i in group)), frames)
            for group in groups
            if group
        ]


@dataclass(frozen=True, slots=True)
class MergedGrid(EqualLengths):
    """Fast mode for a network that can mask padding. Rows are padded as `shapes` says.

    Clips of different lengths share a padded call if that is predicted to be faster than separate calls.
    """

    def split(self, lanes: Sequence[Lane]) -> list[Call]:
        """Split the lanes into calls so that the total predicted time is smallest. Each call has lanes of adjacent
        padded lengths.
        """
        by_length = _by_length(lanes, self.padded)
        lengths = sorted(by_length)
        rows = [sum(lanes[i].branches for i in by_length[length]) for length in lengths]
        call_ms = cache(self.call_ms)
        # Dynamic programming. best[stop] is the solution for the `stop` shortest lengths: the least predicted ms, and
        # the index of the shortest length in the last group. The lengths of a group share calls.
        best: list[tuple[float, int]] = [(0.0, 0)]
        for stop, frames in enumerate(lengths, start=1):
            candidates = [
                (best[start][0] + self.shapes.cut(sum(rows[start:stop]), frames, call_ms=call_ms)[0], start)
                for start in range(stop)
            ]
            best.append(min(candidates))
        calls: list[Call] = []
        stop = len(lengths)
        while stop > 0:
            start = best[stop][1]
            members = [i for length in lengths[start:stop] for i in by_length[length]]
            calls = self._fill(lanes, members, frames=lengths[stop - 1]) + calls
            stop = start
        return calls

    def padded(self, frames: int) -> int:
        return self.shapes.padded(frames)


@dataclass(frozen=True, slots=True)
class Packed:
    """Fast mode for a CPU: all clips share one call, which concatenates them without padding.

    `knee_tokens` is as in EqualLengths.
    """

    knee_tokens: Callable[[int], float]

    def split(self, lanes: Sequence[Lane]) -> list[Call]:
        """Return one call for all lanes, sorted by length. Returns no call if there are no lanes."""
        if not lanes:
            return []
        members = sorted(range(len(lanes)), key=lambda i: lanes[i].frames)
        lengths = _row_lengths(lanes, members)
        return [Call(tuple(members), len(lengths), lengths[-1], lengths)]

    def typical_rows(self, branches: int, frames: int) -> int:
        return max(branches, int(self.knee_tokens(frames) / frames))

    def padded(self, frames: int) -> int:
        return frames


@dataclass(frozen=True, slots=True)
class PackedGraphs(Packed):
    """Fast mode for devices where packed calls (clips concatenated without padding) can be captured as CUDA graphs.

    A single clip is packed, too: attention without a mask takes a third of the time of attention that masks padding.

    The network adds `prefix` tokens to the latent frames of each row. The longest possible row has `longest` frames.
    """

    prefix: int
    longest: int

    def split(self, lanes: Sequence[Lane]) -> list[Call]:
        """Return packed calls for all lanes, sorted by length. Each call has at most PACKED_ROWS[-1] network rows."""
        by_length = sorted(range(len(lanes)), key=lambda i: lanes[i].frames)
        groups = _groups(lanes, by_length, capacity=PACKED_ROWS[-1])
        return [self._call(group, _row_lengths(lanes, group)) for group in groups]

    def typical_rows(self, branches: int, frames: int) -> int:
        return min(Packed.typical_rows(self, branches, frames), PACKED_ROWS[-1])

    def _call(self, members: Sequence[int], lengths: tuple[int, ...]) -> Call:
        """Return the call of the smallest allowed capacity for rows of these lengths."""
        needed = sum(lengths) + self.prefix * len(lengths)
        tokens = round_up(needed, max(2 ** (needed.bit_length() - 1) // _STEPS_PER_OCTAVE, _LEAST_STEP))
        rows = PACKED_ROWS[bisect_left(PACKED_ROWS, len(lengths))]
        longest = min(self.longest, tokens - self.prefix)
        short = -(-longest // _SHORT)
        frames = short if max(lengths) <= short else longest
        return Call(tuple(members), rows, frames, lengths, tokens, tokens - needed)
