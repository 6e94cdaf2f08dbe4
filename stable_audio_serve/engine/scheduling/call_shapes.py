"""The allowed shapes of a denoiser call: its numbers of network rows and padded lengths, or the room of a packed call.
`batching` fills the calls. Independent of lanes and devices.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

CallMs = Callable[[int, int], float]

# Each call shape needs a graph, so there are few. Powers of two alone would cost 15 % of the capacity.
GRAPH_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
# (up to this many grid steps, pad to a multiple of this many): longer rows use a coarser grid, at most an eighth more.
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
        """Returns the padded length of a row of `frames` latent frames."""
        return round_up(frames, self.grid)

    def least(self, rows: int) -> int:
        """Returns the size of the smallest call for this many rows, dummies included."""
        return rows

    def most(self, rows: int) -> int:
        """Returns the size of the largest call that this many rows fill completely; 0 if there is none."""
        return rows


@dataclass(frozen=True, slots=True)
class GraphShapes:
    """Calls that replay captured graphs: row counts from `rows` (ascending from 1), lengths on a grid that coarsens.

    A call has at most `max_tokens` latent frames, dummies and padding included, unless it holds one row only.
    """

    grid: int = 64
    max_tokens: int = 16_384
    rows: tuple[int, ...] = GRAPH_ROWS

    def padded(self, frames: int) -> int:
        """Returns the padded length of a row of `frames` latent frames."""
        for num_steps, factor in _GROWTH:
            if frames <= num_steps * self.grid:
                return round_up(frames, factor * self.grid)
        return round_up(frames, _COARSEST * self.grid)

    def least(self, rows: int) -> int:
        """Returns the size of the smallest call for this many rows, dummies included."""
        return self.rows[bisect_left(self.rows, rows)]

    def most(self, rows: int) -> int:
        """Returns the size of the largest call that this many rows fill completely; 0 if there is none."""
        index = bisect_right(self.rows, rows)
        return self.rows[index - 1] if index else 0


CallShapes = AnyRows | GraphShapes


# The cost of a packed call depends on its tokens, hardly on unused rows, so one row count is enough. A room has at most
# an eighth more tokens than needed, a sixteenth on average. Small rooms have coarser steps, because there reading the
# weights dominates.
PACKED_ROWS = 64
_LEAST_STEP, _STEPS_PER_OCTAVE = 256, 8
_SHORT = 4  # a second kind of room holds rows of at most a quarter of the longest length
# Beside packed calls, padded calls serve single rows and rows of equal length.
GRAPH_ROWS_BESIDE_PACKED = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True, slots=True)
class PackedRoom:
    """The fixed capacity of a captured packed call: `tokens` in all, in at most `rows` rows of at most `longest` latent
    frames.
    """

    tokens: int
    rows: int
    longest: int


@dataclass(frozen=True, slots=True)
class PackedShapes:
    """The rooms of packed calls. Each row has `prefix` tokens besides its latent frames."""

    prefix: int
    longest: int  # latent frames of the longest possible row

    def room(self, lengths: Sequence[int]) -> PackedRoom:
        """Returns the smallest room for rows of these latent frames, at most PACKED_ROWS of them."""
        tokens = sum(lengths) + self.prefix * len(lengths)
        short = -(-self.longest // _SHORT)
        return PackedRoom(
            tokens=round_up(tokens, max(2 ** (tokens.bit_length() - 1) // _STEPS_PER_OCTAVE, _LEAST_STEP)),
            rows=PACKED_ROWS,
            longest=short if max(lengths) <= short else self.longest,
        )


def most_rows(shapes: CallShapes, frames: int) -> int:
    """Returns the largest number of rows padded to `frames` in one call; at least one."""
    return max(shapes.most(shapes.max_tokens // frames), 1)


def cut(shapes: CallShapes, call_ms: CallMs, *, rows: int, frames: int) -> tuple[float, list[int]]:
    """Returns the least predicted time of calls for `rows` rows padded to `frames`, and the call sizes, largest first.

    Full calls come first. The remainder is padded to one call or cut into several, whichever is predicted to be faster.
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
