"""The parts by number."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.gpu import lone, mixes, precision, profiling
from benchmarks.gpu.record import Done, Measurement
from benchmarks.gpu.subjects import Bench

Measurements = Callable[[Bench, Done], list[Measurement]]
Summarize = Callable[[Done], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Part:
    """`name` is of the file; `measurements` lists what there is to do, `summarize` gives the goals' figures."""

    name: str
    measurements: Measurements
    summarize: Summarize


def _mixes(runs: Sequence[mixes.MixRun]) -> tuple[Measurements, Summarize]:
    return partial(mixes.measurements, runs=runs), partial(mixes.summarize, runs=runs)


PARTS = {
    1: Part("lone", lone.measurements, lone.summarize),
    2: Part("profile", profiling.measurements, profiling.summarize),
    3: Part("small", *_mixes(mixes.SMALL)),
    4: Part("medium", *_mixes(mixes.MEDIUM)),
    5: Part("precision", precision.measurements, precision.summarize),
}
