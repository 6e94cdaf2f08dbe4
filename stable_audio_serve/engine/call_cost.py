"""How long one device call takes, as a formula of its shape, and the fit of that formula to timed calls. Knows no
clock, no kinds of work and no scheduler.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt

_NOISE = 0.02  # relative error that a timing has anyway: a term that explains less than this is left out
_TERM_PRICE = 4.0  # Akaike's criterion has 2; terms that only explain noise are wrong at larger shapes
_FIXED, _PER_ROW, _PER_FRAME, _PER_SQUARE = range(4)

Array = npt.NDArray[np.float64]
Groups = tuple[tuple[int, int], ...]  # the rows of one call: (rows, latent frames of each)


@dataclass(frozen=True, slots=True)
class Measurement:
    """One timed device call over `rows` rows of `frames` latent frames each."""

    rows: int
    frames: int
    ms: float


@dataclass(frozen=True, slots=True)
class CallCost:
    """ms = max(floor, fixed + rows * (per_row + per_frame * frames + per_square * frames^2)), all at least 0.

    The floor is what the host or the memory needs however few the rows are; rows below it are free.
    """

    fixed_ms: float = 1.0
    per_row_ms: float = 0.0
    per_frame_ms: float = 0.05
    per_square_ms: float = 0.0
    floor_ms: float = 0.0

    def row_ms(self, frames: int) -> float:
        """Returns the time that one more row of `frames` latent frames adds to a call above the floor."""
        return self.per_row_ms + (self.per_frame_ms + self.per_square_ms * frames) * frames

    def call_ms(self, rows: int, frames: int) -> float:
        """Returns the time of a whole call over `rows` rows padded to `frames` latent frames."""
        return max(self.floor_ms, self.fixed_ms + rows * self.row_ms(frames))

    def groups_ms(self, groups: Groups) -> float:
        """Returns the time of a whole call over rows of several lengths, packed without padding."""
        return max(self.floor_ms, self.fixed_ms + sum(rows * self.row_ms(frames) for rows, frames in groups))

    def worthwhile_ms(self, overhead_share: float) -> float:
        """Returns how long the rows of a call must take, so that what the call takes besides is this share of it."""
        return (1.0 - overhead_share) * max(self.fixed_ms / overhead_share, self.floor_ms)


def fit_call_cost(measurements: Iterable[Measurement]) -> CallCost:
    """Fit by least squares on relative errors, every coefficient at least 0; more rows or frames always cost more.

    Timings disturbed by other programs are corrected where a larger call was faster. A term is used only where it
    explains more than the noise. Raises ValueError without measurements.
    """
    points = _undisturbed(measurements)
    if not points:
        raise ValueError("a cost needs at least one measurement")
    features = np.array([(1.0, m.rows, m.rows * m.frames, m.rows * m.frames**2) for m in points])
    ms = np.array([m.ms for m in points])
    return min(_candidates(features, ms), key=lambda candidate: candidate[0])[1]


def _undisturbed(measurements: Iterable[Measurement]) -> list[Measurement]:
    """Returns one measurement of each shape, shortest first: no call takes longer than one with more rows or frames."""
    measured = [Measurement(m.rows, m.frames, max(m.ms, 1e-6)) for m in measurements]
    shapes = {(m.rows, m.frames) for m in measured}
    points = [
        Measurement(rows, frames, min(m.ms for m in measured if m.rows >= rows and m.frames >= frames))
        for rows, frames in shapes
    ]
    return sorted(points, key=lambda m: (m.ms, m.rows * m.frames, m.rows))


def _candidates(features: Array, ms: Array) -> Iterator[tuple[float, CallCost]]:
    """Yields formulas with their scores, the least being the best: the shortest calls at the floor, the rest above."""
    growth = _PER_FRAME if features[:, _PER_FRAME].any() else _PER_ROW
    for num_flat in range(len(ms)):
        floor_ms = float(np.median(ms[:num_flat])) if num_flat else 0.0
        for terms in _terms(len(ms) - num_flat, growth=growth):
            coefficients = _solve(features[num_flat:][:, terms], ms[num_flat:])
            if coefficients is None:
                continue
            solution = np.zeros(4)
            solution[terms] = coefficients
            score = _score(features @ solution, ms, floor_ms=floor_ms, num_terms=len(terms) + (num_flat > 0))
            yield score, _cost(solution, floor_ms=floor_ms)
    # Nothing grows with the shape: it would within twice the largest shape, or a little beyond.
    flat_ms = float(np.median(ms))
    solution = np.zeros(4)
    solution[growth] = flat_ms / 2 / max(float(features[:, growth].max()), 1.0)
    solution[_FIXED] = flat_ms / 2
    yield (
        _score(features @ solution, ms, floor_ms=flat_ms, num_terms=1),
        _cost(solution, floor_ms=flat_ms),
    )


def _cost(coefficients: Array, *, floor_ms: float) -> CallCost:
    fixed, per_row, per_frame, per_square = (float(c) for c in coefficients)
    return CallCost(fixed, per_row, per_frame, per_square, floor_ms)


def _terms(num_points: int, *, growth: int) -> Iterator[list[int]]:
    """Yields the sets of terms that so many points can tell, each with one that grows with the shape."""
    others = [_FIXED] if growth == _PER_ROW else [_FIXED, _PER_ROW, _PER_SQUARE]
    for count in range(min(len(others), num_points - 1) + 1):
        for some in combinations(others, count):
            yield sorted((growth, *some))


def _solve(features: Array, ms: Array) -> Array | None:
    """Returns the coefficients of least relative error; None if one of them is not positive."""
    columns = features / ms[:, None]
    norms = np.linalg.norm(columns, axis=0)
    if not norms.all():
        return None
    columns = columns / norms
    try:
        coefficients = np.linalg.solve(columns.T @ columns, columns.sum(axis=0)) / norms
    except np.linalg.LinAlgError:  # terms that these shapes cannot tell apart
        return None
    return coefficients if (coefficients > 0).all() else None


def _score(above_ms: Array, ms: Array, *, floor_ms: float, num_terms: int) -> float:
    """Returns Akaike's criterion of a formula with a higher price per term, given its values above the floor."""
    errors = np.log(np.maximum(above_ms, floor_ms) / ms)
    return float(len(ms) * np.log(np.mean(errors**2) + _NOISE**2) + _TERM_PRICE * num_terms)
