"""The allowed shapes of denoiser calls: network rows and padded length, or the capacity of a packed call. `batching`
assigns rows to calls. Independent of lanes and devices.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

CallMs = Callable[[int, int], float]

# Network rows of a call. There are few choices, because each call shape needs a graph. Powers of two alone would waste
# 15 % of the capacity on dummy rows.
GRAPH_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
# (length, multiple), both in grid steps: rows up to this length are padded to this multiple, longer rows to a multiple
# of `_COARSEST`. A multiple above 1 pads a row by at most an eighth.
_GROWTH = ((16, 1), (32, 2))
_COARSEST = 4


def round_up(value: int, multiple: int) -> int:
    """Return the smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple


@dataclass(frozen=True, slots=True)
class AnyRows:
    """Calls that need no graph: any number of rows within `max_tokens` latent frames, padded to `grid`."""

    grid: int = 1
    max_tokens: int = 16_384

    def padded(self, frames: int) -> int:
        """Return the padded length of a row of `frames` latent frames."""
        return round_up(frames, self.grid)

    def least(self, rows: int) -> int:
        """Return the number of rows, dummies included, of the smallest call for this many rows."""
        return rows

    def most(self, rows: int) -> int:
        """Return the number of rows of the largest call that this many rows fill completely; 0 if there is none."""
        return rows


@dataclass(frozen=True, slots=True)
class GraphShapes:
    """Calls that replay captured graphs: row counts from `rows` (ascending from 1), lengths on a grid that gets
    coarser.

    A call has at most `max_tokens` latent frames, dummies and padding included, unless it holds one row only.
    """

    grid: int = 64
    max_tokens: int = 16_384
    rows: tuple[int, ...] = GRAPH_ROWS

    def padded(self, frames: int) -> int:
        """Return the padded length of a row of `frames` latent frames."""
        for num_steps, factor in _GROWTH:
            if frames <= num_steps * self.grid:
                return round_up(frames, factor * self.grid)
        return round_up(frames, _COARSEST * self.grid)

    def least(self, rows: int) -> int:
        """Return the number of rows, dummies included, of the smallest call for this many rows."""
        return self.rows[bisect_left(self.rows, rows)]

    def most(self, rows: int) -> int:
        """Return the number of rows of the largest call that this many rows fill completely; 0 if there is none."""
        index = bisect_right(self.rows, rows)
        return self.rows[index - 1] if index else 0


CallShapes = AnyRows | GraphShapes


# The time of a packed call hardly depends on unused rows, so one row count is enough. Its tokens are rounded up by at
# most an eighth, a sixteenth on average. Small calls are rounded more coarsely, because their time is mostly reading
# the weights.
PACKED_ROWS = 64
_LEAST_STEP, _STEPS_PER_OCTAVE = 256, 8
_SHORT = 4  # if all rows are shorter than the longest length divided by this, the room's `longest` is reduced to that
# Network rows of a padded call if calls can also be packed: then only single rows and rows of equal length are padded.
GRAPH_ROWS_WITH_PACKED = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True, slots=True)
class PackedRoom:
    """The capacity of a captured packed call: `tokens` in total, at most `rows` rows, each of at most `longest` latent
    frames.
    """

    tokens: int
    rows: int
    longest: int


@dataclass(frozen=True, slots=True)
class PackedShapes:
    """Chooses the rooms of packed calls. Each row has `prefix` tokens in addition to its latent frames."""

    prefix: int
    longest: int  # latent frames of the longest possible row

    def room(self, lengths: Sequence[int]) -> PackedRoom:
        """Return the smallest room for rows of these lengths in latent frames, at most PACKED_ROWS of them."""
        tokens = sum(lengths) + self.prefix * len(lengths)
        short = -(-self.longest // _SHORT)
        return PackedRoom(
            tokens=round_up(tokens, max(2 ** (tokens.bit_length() - 1) // _STEPS_PER_OCTAVE, _LEAST_STEP)),
            rows=PACKED_ROWS,
            longest=short if max(lengths) <= short else self.longest,
        )


def most_rows(shapes: CallShapes, frames: int) -> int:
    """Return the largest number of rows padded to `frames` in one call; at least one."""
    return max(shapes.most(shapes.max_tokens // frames), 1)


def cut(shapes: CallShapes, call_ms: CallMs, *, rows: int, frames: int) -> tuple[float, list[int]]:
    """Split `rows` rows, padded to `frames`, into calls. Returns their predicted time in ms and their sizes.

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
