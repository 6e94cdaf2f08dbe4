"""The performance goals, and a line that compares each with results: `P4 demo-wide p95 0.66 (0.62-0.71) <= 0.7 ok`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.report import format_cell

Verdict = Literal["ok", "close", "MISS", "void", "not measured"]


@dataclass(frozen=True, slots=True)
class Goal:
    """A bound on one figure of a result file. `path` has the keys that lead to the figure in the file's results.

    The figure is a ratio with its interval, or a number. If the figure `NAME` is a number, its values in all rounds may
    be next to it, as `NAME_rounds`.
    """

    id: str
    what: str
    case: str
    path: tuple[str, ...]
    bound: float
    larger_is_better: bool = False

    @property
    def sign(self) -> str:
        return ">=" if self.larger_is_better else "<="


@dataclass(frozen=True, slots=True)
class Standing:
    """A goal with its measured value and the interval of this value."""

    goal: Goal
    value: float | None = None
    low: float | None = None
    high: float | None = None
    is_void: bool = False

    @property
    def verdict(self) -> Verdict:
        if self.value is None or self.low is None or self.high is None:
            return "not measured"
        if self.is_void:
            return "void"
        if self._meets(self.value):
            return "ok"
        return "close" if self._meets(self.high if self.goal.larger_is_better else self.low) else "MISS"

    def __str__(self) -> str:
        goal, interval = self.goal, ""
        if self.low is not None and self.high is not None and self.low != self.high:
            interval = f" ({format_cell(self.low)}-{format_cell(self.high)})"
        value = "" if self.value is None else f" {format_cell(self.value)}{interval}"
        return f"{goal.id} {goal.what}{value} {goal.sign} {goal.bound:g} {self.verdict}"

    def _meets(self, value: float) -> bool:
        return value >= self.goal.bound if self.goal.larger_is_better else value <= self.goal.bound


def read_standings(folder: Path, goals: Iterable[Goal]) -> list[Standing]:
    """Returns each goal with its value from the result files in a folder."""
    results = {path.stem: json.loads(path.read_text())["results"] for path in folder.glob("*.json")}
    return [_stand(goal, results.get(goal.case)) for goal in goals]


def _stand(goal: Goal, results: Mapping[str, Any] | None) -> Standing:
    found = _find(results, goal.path)
    if results is None or found is None:
        return Standing(goal)
    is_void = bool(results.get("is_void"))
    if isinstance(found, Mapping):
        return Standing(goal, found["value"], found["low"], found["high"], is_void)
    rounds = _find(results, (*goal.path[:-1], f"{goal.path[-1]}_rounds")) or []
    values = [float(found), *map(float, rounds)]
    return Standing(goal, values[0], min(values), max(values), is_void)


def _find(results: Any, path: Sequence[str]) -> Any:
    for name in path:
        if not isinstance(results, Mapping) or results.get(name) is None:
            return None
        results = results[name]
    return results


# One goal per line: id; description; result file; keys of the figure, separated by dots; bound.
_TABLE = """
P1; demo-wide fast capacity; run-demo-wide; ratios.ours-fast.lock.capacity; >= 1.6
P1; demo-fast fast capacity; run-demo-fast; ratios.ours-fast.lock.capacity; >= 1.2
P1; demo-wide strict capacity; run-demo-wide; ratios.ours-strict.lock.capacity; >= 0.97
P1; demo-fast strict capacity; run-demo-fast; ratios.ours-strict.lock.capacity; >= 0.97
P2; demo-wide fast capacity over static; run-demo-wide; ratios.ours-fast.static.capacity; >= 1.1
P2; demo-fast fast capacity over static; run-demo-fast; ratios.ours-fast.static.capacity; >= 1.1
P4; demo-wide fast p95; run-demo-wide; ratios.ours-fast.lock.p95; <= 0.7
P4; demo-fast fast p95; run-demo-fast; ratios.ours-fast.lock.p95; <= 0.9
P4; demo-wide strict p95; run-demo-wide; ratios.ours-strict.lock.p95; <= 1.0
P5; demo-wide fast p95 of 8 steps; run-demo-wide; ratios.ours-fast.lock.p95_8; <= 0.3
P5; demo-wide fast p95 of 50 steps; run-demo-wide; ratios.ours-fast.lock.p95_50; <= 1.5
P5; demo-wide strict p95 of 8 steps; run-demo-wide; ratios.ours-strict.lock.p95_8; <= 0.3
P5; demo-wide strict p95 of 50 steps; run-demo-wide; ratios.ours-strict.lock.p95_50; <= 1.7
P6; demo-wide fast goodput; run-demo-wide; ratios.ours-fast.lock.goodput; >= 1.2
P7; time of a single request in process over the allowed time; http; engine_over_allowed_ratio; <= 1
P7; time of a single request over HTTP over the allowed time; http; http_over_allowed_ratio; <= 1
P11; memory growth; memory; memory_rss_growth_share; <= 0.02
P14; cold start over Ray's start and the bare load; cold-start; first_audio_over_ray_plus_bare_ratio; <= 2
P15; capacity of 2 simulated replicas over one; scale; stand_in.worst_capacity_over_one.2; >= 1.9
P15; capacity of 4 simulated replicas over one; scale; stand_in.worst_capacity_over_one.4; >= 3.6
P15; capacity of 2 demo replicas over one; scale; model.worst_capacity_over_one.2; >= 1.6
P18; overload goodput over peak; overload; model.worst_goodput_over_peak_ratio; >= 0.9
P18; overload refusals p50 (ms); overload; model.worst_refusal_p50_ms; <= 20
P18; overload refusals p99 (ms); overload; model.worst_refusal_p99_ms; <= 100
P18; overload time until normal (s); overload; model.worst_normal_after_s; <= 30
P18; overload served within four tries (share); overload; model.worst_served_within_four_tries_share; >= 0.95
P22; small-mixed capacity, simulated; simulate; mixes.small-mixed.packed.capacity_over_lock_ratio; >= 1.9
P22; small-mixed p95, simulated; simulate; mixes.small-mixed.packed.p95_over_lock_ratio; <= 0.5
P22; small-mixed p95 of 8 steps, simulated; simulate; mixes.small-mixed.packed.p95_8_over_lock_ratio; <= 0.06
P22; small-mixed p95 of 100 steps, simulated; simulate; mixes.small-mixed.packed.p95_100_over_lock_ratio; <= 1.5
P22; medium-mixed p95, simulated; simulate; mixes.medium-mixed.packed.p95_over_lock_ratio; <= 0.45
P22; medium-mixed p95 of 8 steps, simulated; simulate; mixes.medium-mixed.packed.p95_8_over_lock_ratio; <= 0.1
P22; medium-mixed p95 of 100 steps, simulated; simulate; mixes.medium-mixed.packed.p95_100_over_lock_ratio; <= 1.5
P23; two threads over one: throughput; threads; speedup.2; >= 1.67
L1; throughput with an adapter per request over plain; adapters; throughput_ratio; >= 0.8
L2; new strength of a loaded adapter (ms); adapters; new_strength_ms; <= 50
L2; first load of an adapter of rank 16 (s); adapters; first_load_s; <= 1
P25; small-mixed p95 by predicted work over Serve's router; routing; p95_over_serve_ratio; <= 0.8
"""


_GPU_TABLE = """
P10; small-mixed busy share; gpu-first; load-small.trace.busy_share; >= 0.95
P10; medium-mixed busy share; gpu-first; load-medium.trace.busy_share; >= 0.95
P10; small-mixed wait for the host between steps (ms); gpu-first; load-small.trace.host_gap_ms; <= 0.3
P11; memory growth from 50 to 500 requests; gpu-first; leak.growth_share.held; <= 0.01
"""


def _parse(table: str) -> Iterator[Goal]:
    for line in table.strip().splitlines():
        id, what, case, path, bound = line.split("; ")
        yield Goal(id, what, case, tuple(path.split(".")), float(bound[3:]), bound.startswith(">="))


GOALS = tuple(_parse(_TABLE))

# Stability AI's published figures for one H200. The work of each clip is computed from the shapes of the networks.
FLOPS = 790e12  # operations per second, sustained, in half precision


@dataclass(frozen=True, slots=True)
class ClipRow:
    """One clip of one model: its work, the published TensorRT time and peak memory, and our goals.

    The ideal time is the longer one of two times: the time for the operations at `FLOPS`, and the time to read and
    write weights and activations at 4.3 TB/s. `alone_share` and `crowd_share` are our goals for one clip and for eight
    clips at once, as shares of the ideal speed.
    """

    model: str  # small or medium
    duration_s: float
    clip_tflop: float
    ideal_ms: float
    tensorrt_ms: float
    peak_gb: float
    alone_share: float | None = None
    crowd_share: float | None = None

    @property
    def name(self) -> str:
        return f"{self.model} {self.duration_s:g} s"


CLIPS = (
    ClipRow("small", 5, 1.09, 2.2, tensorrt_ms=17, peak_gb=1.7),
    ClipRow("small", 30, 3.48, 4.4, tensorrt_ms=22, peak_gb=1.9, crowd_share=0.35),
    ClipRow("small", 120, 12.8, 16.2, tensorrt_ms=44, peak_gb=2.4, alone_share=0.28),
    ClipRow("medium", 5, 3.95, 7.1, tensorrt_ms=20, peak_gb=5.1),
    ClipRow("medium", 30, 13.8, 17.5, tensorrt_ms=50, peak_gb=5.5, alone_share=0.25, crowd_share=0.42),
    ClipRow("medium", 120, 52.0, 65.8, tensorrt_ms=130, peak_gb=6.5, alone_share=0.38),
)


def _of_clips() -> Iterator[Goal]:
    for row in CLIPS:
        for id, what, figure, bound, larger_is_better in (
            ("P8", "over TensorRT", "over_tensorrt_ratio", 1.5, False),
            ("P9", "alone, share of ideal speed", "roofline_share_alone", row.alone_share, True),
            ("P9", "together, share of ideal speed", "roofline_share_crowd", row.crowd_share, True),
            ("P11", "peak above allowed (GB)", "peak_over_allowed_gb", 0.0, False),
        ):
            if bound is not None:
                path = (f"times-{row.model}", "clips", row.name, figure)
                yield Goal(id, f"{row.name} {what}", "gpu-first", path, bound, larger_is_better)


GPU_GOALS = (*_of_clips(), *_parse(_GPU_TABLE))
