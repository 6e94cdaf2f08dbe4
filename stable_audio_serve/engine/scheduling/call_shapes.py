"""The allowed shapes of denoiser calls: batch size and padded length, or the capacity of a packed call. `batching`
decides which clips are in which call.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

CallMs = Callable[[int, int], float]

# The allowed batch sizes of the network. They are few, because each call shape needs a CUDA graph. With powers of two
# alone, 15 % of all rows would be dummy rows, which fill up a batch.
GRAPH_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
# Pairs (longest, multiple), both in units of the grid: the length of a row up to `longest` is padded to a multiple of
# `multiple`. Longer rows are padded to a multiple of `_COARSEST`. Beyond the first pair, padding adds at most an
# eighth.
_GROWTH = ((16, 1), (32, 2))
_COARSEST = 4


def round_up(value: int, multiple: int) -> int:
    """Return the smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple


@dataclass(frozen=True, slots=True)
class AnyRows:
    """The shapes of calls without CUDA graphs: any batch size, with lengths padded to a multiple of `grid`.

    A call has at most `max_tokens` latent frames, all rows together.
    """

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
    """The shapes of calls that run as CUDA graphs: the batch size is one of `rows` (ascending from 1). Lengths are
    padded to a multiple of `grid`, and those of long rows to a larger multiple.

    A call has at most `max_tokens` latent frames, dummy rows and padding included, unless its batch size is 1.
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


# The capacity of a packed call, in rows and tokens. Unused rows cost almost no time, so one capacity in rows is enough.
# The capacity in tokens is the needed number rounded up, by at most an eighth and on average a sixteenth. Small numbers
# are rounded up more, because a small call spends most of its time reading the weights.
PACKED_ROWS = 64
_LEAST_STEP, _STEPS_PER_OCTAVE = 256, 8
_SHORT = 4  # clips up to 1/4 of the longest length get call shapes of their own, in which every row is that short
# The allowed batch sizes of padded calls if calls can also be packed. Fewer are enough, because only single clips and
# clips of equal length are then padded.
GRAPH_ROWS_WITH_PACKED = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True, slots=True)
class PackedRoom:
    """The capacity of a packed call that runs as a CUDA graph: `tokens` in total, in at most `rows` rows of at most
    `longest` latent frames each.
    """

    tokens: int
    rows: int
    longest: int


@dataclass(frozen=True, slots=True)
class PackedShapes:
    """Chooses the capacities of packed calls. The network adds `prefix` tokens to the latent frames of each row."""

    prefix: int
    longest: int  # latent frames of the longest possible row

    def room(self, lengths: Sequence[int]) -> PackedRoom:
        """Return the smallest allowed capacity for rows of these lengths in latent frames; at most PACKED_ROWS rows."""
        tokens = sum(lengths) + self.prefix * len(lengths)
        short = -(-self.longest // _SHORT)
        return PackedRoom(
            tokens=round_up(tokens, max(2 ** (tokens.bit_length() - 1) // _STEPS_PER_OCTAVE, _LEAST_STEP)),
            rows=PACKED_ROWS,
            longest=short if max(lengths) <= short else self.longest,
        )


def most_rows(shapes: CallShapes, frames: int) -> int:
    """Return the largest allowed batch size of a call whose rows are padded to `frames` latent frames; at least 1."""
    return max(shapes.most(shapes.max_tokens // frames), 1)


def cut(shapes: CallShapes, call_ms: CallMs, *, rows: int, frames: int) -> tuple[float, list[int]]:
    """Split `rows` rows, padded to `frames`, into calls. Returns the total predicted time in ms and the batch sizes.

    Calls of the largest batch size come first. For the remaining rows there is either one call with dummy rows or
    several smaller calls, whichever is predicted to be faster.
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
