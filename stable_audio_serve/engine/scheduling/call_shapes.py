"""Which shapes a denoiser call may have: its numbers of network rows and its padded lengths, or a packed call's room.
Knows no lanes and no device; `batching` fills the calls.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

CallMs = Callable[[int, int], float]

# A graph is captured for each shape of a call, so there are few. Powers of two alone cost 15 % of the capacity.
GRAPH_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
# (up to so many grid steps, a multiple of so many): long rows are padded to a coarser grid, by an eighth at most.
_GROWTH = ((16, 1), (32, 2))
_COARSEST = 4


def round_up(value: int, multiple: int) -> int:
    """Returns the smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple


@dataclass(frozen=True, slots=True)
class AnyRows:
    """Calls that need no graph: any number of rows within `max_tokens` latent frames, padded to `grid`."""

    grid: int = 1
    max_tokens: int = 16_384

    def padded(self, frames: int) -> int:
        """Returns the padded length of rows of `frames` latent frames."""
        return round_up(frames, self.grid)

    def least(self, rows: int) -> int:
        """Returns the smallest size of a call that holds so many rows, dummies included."""
        return rows

    def most(self, rows: int) -> int:
        """Returns the largest size of a call that so many rows fill; 0 if there is none."""
        return rows


@dataclass(frozen=True, slots=True)
class GraphShapes:
    """Calls that replay captured graphs: row counts of `rows`, ascending from 1, lengths on a grid that grows too.

    A call has at most `max_tokens` latent frames, dummies and padding included, unless it holds a single request's row.
    """

    grid: int = 64
    max_tokens: int = 16_384
    rows: tuple[int, ...] = GRAPH_ROWS

    def padded(self, frames: int) -> int:
        """Returns the padded length of rows of `frames` latent frames."""
        for num_steps, factor in _GROWTH:
            if frames <= num_steps * self.grid:
                return round_up(frames, factor * self.grid)
        return round_up(frames, _COARSEST * self.grid)

    def least(self, rows: int) -> int:
        """Returns the smallest size of a call that holds so many rows, dummies included."""
        return self.rows[bisect_left(self.rows, rows)]

    def most(self, rows: int) -> int:
        """Returns the largest size of a call that so many rows fill; 0 if there is none."""
        index = bisect_right(self.rows, rows)
        return self.rows[index - 1] if index else 0


CallShapes = AnyRows | GraphShapes


# A packed call costs what its tokens do, and next to nothing for rows that are not there: so there is one number of
# rows. A call has room for an eighth more tokens at most, a sixteenth on average; where fewer tokens are hardly faster,
# because all weights are read anyway, the steps are coarser.
PACKED_ROWS = 64
_LEAST_STEP, _STEPS_PER_OCTAVE = 256, 8
_SHORT = 4  # rooms for rows of any length, and for rows of a quarter of that
# Beside packed calls, padded ones are for a row alone and for rows alike.
GRAPH_ROWS_BESIDE_PACKED = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True, slots=True)
class PackedRoom:
    """What a graph of packed rows has fixed: room for so many `tokens` in so many `rows`, none of them with more latent
    frames than `longest`."""

    tokens: int
    rows: int
    longest: int


@dataclass(frozen=True, slots=True)
class PackedShapes:
    """Rooms of packed calls. Each row has `prefix` tokens of its own besides its latent frames."""

    prefix: int
    longest: int  # latent frames of the longest row there is

    def room(self, lengths: Sequence[int]) -> PackedRoom:
        """Returns the smallest room that holds rows of so many latent frames each, at most PACKED_ROWS of them."""
        tokens = sum(lengths) + self.prefix * len(lengths)
        short = -(-self.longest // _SHORT)
        return PackedRoom(
            tokens=round_up(tokens, max(2 ** (tokens.bit_length() - 1) // _STEPS_PER_OCTAVE, _LEAST_STEP)),
            rows=PACKED_ROWS,
            longest=short if max(lengths) <= short else self.longest,
        )


def most_rows(shapes: CallShapes, frames: int) -> int:
    """Returns how many rows padded to `frames` a call may have: at least one."""
    return max(shapes.most(shapes.max_tokens // frames), 1)


def cut(shapes: CallShapes, call_ms: CallMs, *, rows: int, frames: int) -> tuple[float, list[int]]:
    """Returns the least predicted time of calls for so many rows padded to `frames`, and their sizes, largest first.

    Full calls first; what is left is padded to one call or cut into two or more, whichever is predicted to be faster.
    """
    full = most_rows(shapes, frames)
    num_full, left = divmod(rows, full)
    ms, sizes = (num_full * call_ms(full, frames) if num_full else 0.0), [full] * num_full
    if left:
        left_ms, left_sizes = _cut_rest(shapes, call_ms, rows=left, frames=frames)
        ms, sizes = ms + left_ms, sizes + left_sizes
    return ms, sizes


def _cut_rest(shapes: CallShapes, call_ms: CallMs, *, rows: int, frames: int) -> tuple[float, list[int]]:
    padded = shapes.least(rows)
    padded_ms = call_ms(padded, frames)
    if padded == rows:
        return padded_ms, [padded]
    first = shapes.most(rows)
    rest_ms, rest = _cut_rest(shapes, call_ms, rows=rows - first, frames=frames)
    cut_ms = call_ms(first, frames) + rest_ms
    return (cut_ms, [first, *rest]) if cut_ms < padded_ms else (padded_ms, [padded])
