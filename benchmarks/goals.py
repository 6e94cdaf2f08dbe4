"""The goals as data, and a line per goal that says where we stand: `P4 demo-wide p95 0.66 (0.62-0.71, n 72) <= 0.7 ok`.

Reads result files only. A goal is met by its value; where the value misses but its interval reaches the bound, the line
says `close`; `MISS` means that the whole interval misses. What no file holds is `not measured`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Verdict = Literal["ok", "close", "MISS", "void", "not measured"]


@dataclass(frozen=True, slots=True)
class Goal:
    """A bound on one figure. `path` leads to it within the results of a case's file, `rounds` to that of each round."""

    id: str
    what: str
    case: str
    path: tuple[str, ...]
    bound: float
    larger_is_better: bool = False
    rounds: tuple[str, ...] | None = None
    count: tuple[str, ...] | None = None  # leads to the number of requests behind the figure

    @property
    def sign(self) -> str:
        """How the figure has to compare with the bound."""
        return ">=" if self.larger_is_better else "<="


@dataclass(frozen=True, slots=True)
class Standing:
    """A goal with what was measured: the value, and the least and the most it may be."""

    goal: Goal
    value: float | None = None
    low: float | None = None
    high: float | None = None
    is_void: bool = False
    count: int | None = None

    @property
    def verdict(self) -> Verdict:
        """Whether the goal is met."""
        if self.value is None or self.low is None or self.high is None:
            return "not measured"
        if self.is_void:
            return "void"
        if self._meets(self.value):
            return "ok"
        return "close" if self._meets(self.high if self.goal.larger_is_better else self.low) else "MISS"

    def __str__(self) -> str:
        goal = self.goal
        bound = f"{goal.sign} {_number(goal.bound)}"
        if self.value is None or self.low is None or self.high is None:
            return f"{goal.id} {goal.what} {bound} not measured"
        known = [] if self.low == self.high else [f"{_number(self.low)}-{_number(self.high)}"]
        known += [] if self.count is None else [f"n {self.count}"]
        brackets = f" ({', '.join(known)})" if known else ""
        return f"{goal.id} {goal.what} {_number(self.value)}{brackets} {bound} {self.verdict}"

    def _meets(self, value: float) -> bool:
        return value >= self.goal.bound if self.goal.larger_is_better else value <= self.goal.bound


def read_standings(folder: Path, goals: Iterable[Goal] | None = None) -> list[Standing]:
    """Returns where each goal stands by the result files in a folder."""
    results = {path.stem: json.loads(path.read_text())["results"] for path in folder.glob("*.json")}
    return [_stand(goal, results.get(goal.case)) for goal in (GOALS if goals is None else goals)]


def has_missed(standings: Sequence[Standing]) -> bool:
    """Whether a goal is missed by its whole interval, or what should show it is void."""
    return any(standing.verdict in ("MISS", "void") for standing in standings)


def _stand(goal: Goal, results: Mapping[str, Any] | None) -> Standing:
    found = None if results is None else _find(results, goal.path)
    if results is None or found is None:
        return Standing(goal)
    is_void = bool(results.get("is_void"))
    count = None if goal.count is None else _find(results, goal.count)
    if isinstance(found, Mapping):
        return Standing(goal, found["value"], found["low"], found["high"], is_void, count)
    rounds = [found] if goal.rounds is None else _numbers(_find(results, goal.rounds))
    value = float(found)
    return Standing(goal, value, min(value, *rounds), max(value, *rounds), is_void, count)


def _find(results: Any, path: Sequence[str]) -> Any:
    for name in path:
        if not isinstance(results, Mapping) or results.get(name) is None:
            return None
        results = results[name]
    return results


def _numbers(values: Any) -> list[float]:
    """Returns the numbers of a list, or of the lists of a mapping."""
    if isinstance(values, Mapping):
        return [number for some in values.values() for number in _numbers(some)]
    return [float(value) for value in values or ()]


def _number(value: float) -> str:
    return (
        f"{value:.0f}"
        if abs(value) >= 100 or value == int(value)
        else f"{value:.2f}"
        if value >= 0.1
        else f"{value:.3f}"
    )


def _run(id: str, what: str, *, side: str, figure: str, bound: float, over: str = "lock") -> Goal:
    mix, _, _ = what.partition(" ")
    path, larger_is_better = ("ratios", side, over, figure), figure in ("capacity", "goodput")
    return Goal(id, what, f"run-{mix}", path, bound, larger_is_better, count=("num_requests",))


def _simulated(id: str, what: str, *, figure: str, bound: float) -> Goal:
    """Judged as rows are batched on CUDA in half precision."""
    mix, _, _ = what.partition(" ")
    path, larger_is_better = ("mixes", mix, "packed", figure), figure.startswith("capacity")
    return Goal(id, what, "simulate", path, bound, larger_is_better, count=("mixes", mix, "num_requests"))


_CAPACITY, _P95 = "capacity_over_lock_ratio", "p95_over_lock_ratio"
_P95_8, _P95_100 = "p95_8_over_lock_ratio", "p95_100_over_lock_ratio"

# Of this machine, a CPU: modes strict and fast.
_CPU = (
    _run("P1", "demo-wide fast capacity", side="ours-fast", figure="capacity", bound=1.4),
    _run("P1", "demo-fast fast capacity", side="ours-fast", figure="capacity", bound=1.2),
    _run("P1", "demo-wide strict capacity", side="ours-strict", figure="capacity", bound=0.97),
    _run("P1", "demo-fast strict capacity", side="ours-strict", figure="capacity", bound=0.97),
    _run("P2", "demo-wide fast capacity over static", side="ours-fast", figure="capacity", bound=1.1, over="static"),
    _run("P2", "demo-fast fast capacity over static", side="ours-fast", figure="capacity", bound=1.1, over="static"),
    _run("P4", "demo-wide fast p95", side="ours-fast", figure="p95", bound=0.7),
    _run("P4", "demo-fast fast p95", side="ours-fast", figure="p95", bound=0.9),
    _run("P4", "demo-wide strict p95", side="ours-strict", figure="p95", bound=1.05),
    _run("P5", "demo-wide fast p95 of 8 steps", side="ours-fast", figure="p95_8", bound=0.3),
    _run("P5", "demo-wide fast p95 of 50 steps", side="ours-fast", figure="p95_50", bound=1.5),
    _run("P5", "demo-wide strict p95 of 8 steps", side="ours-strict", figure="p95_8", bound=0.3),
    _run("P5", "demo-wide strict p95 of 50 steps", side="ours-strict", figure="p95_50", bound=1.7),
    _run("P6", "demo-wide fast goodput", side="ours-fast", figure="goodput", bound=1.2),
    Goal(
        "P7",
        "lone request in process over what is allowed",
        "http",
        ("engine_over_allowed_ratio",),
        1.0,
        rounds=("engine_over_allowed_ratio_rounds",),
    ),
    Goal(
        "P7",
        "lone request over HTTP over what is allowed",
        "http",
        ("http_over_allowed_ratio",),
        1.0,
        rounds=("http_over_allowed_ratio_rounds",),
    ),
    Goal("P11", "memory growth", "memory", ("memory_rss_growth_share",), 0.02),
    *(
        Goal(
            "P12",
            f"throughput of 64 in flight over 8, {mode}",
            f"ladder-{mode}",
            ("concurrency_throughput_ratio",),
            0.97,
            larger_is_better=True,
            rounds=("concurrency_throughput_ratio_rounds",),
        )
        for mode in ("strict", "fast")
    ),
    Goal(
        "P12",
        "scheduler's share of a step",
        "ladder-fast",
        ("scheduler_share_of_step",),
        0.02,
        rounds=("scheduler_share_of_step_rounds",),
    ),
    # A share of step time like the one above, not the time of a pick: a step takes a quarter of what waits, 10 rows of
    # 32 and 54 of 256, so a pick that cost the same for every row it returns would take 5.4 times as long.
    Goal(
        "P12",
        "scheduler's share of a step, 256 rows over 32",
        "micro",
        ("scheduler_share_256_over_32_active_ratio",),
        1.3,
        rounds=("scheduler_share_256_over_32_active_ratio_rounds",),
    ),
    *(
        Goal(
            "P13",
            f"4x the frames, {mode}",
            f"ladder-{mode}",
            ("duration_4x_frames_time_ratio",),
            4.8,
            rounds=("duration_4x_frames_time_ratio_rounds",),
        )
        for mode in ("strict", "fast")
    ),
    Goal("P14", "cold start", "cold-start", ("first_audio_over_ray_plus_bare_ratio",), 2.0),
    Goal(
        "P15", "2 stand-in replicas", "scale", ("stand_in", "worst_capacity_over_one", "2"), 1.9, larger_is_better=True
    ),
    Goal(
        "P15", "4 stand-in replicas", "scale", ("stand_in", "worst_capacity_over_one", "4"), 3.6, larger_is_better=True
    ),
    Goal("P15", "2 demo replicas", "scale", ("model", "worst_capacity_over_one", "2"), 1.6, larger_is_better=True),
    Goal(
        "P25",
        "small-mixed p95 by predicted work over Serve's router",
        "routing",
        ("p95_over_serve_ratio",),
        0.8,
        rounds=("p95_over_serve_ratio_rounds",),
    ),
    Goal(
        "P26",
        "bursts, p95 with replicas by predicted work over Serve's policy",
        "autoscale",
        ("p95_over_serve_ratio",),
        0.8,
        rounds=("p95_over_serve_ratio_rounds",),
    ),
    Goal(
        "P26",
        "the same, replicas' time",
        "autoscale",
        ("replica_s_over_serve_ratio",),
        1.0,
        rounds=("replica_s_over_serve_ratio_rounds",),
    ),
    Goal(
        "P16",
        "step rate all MP3 over all WAV",
        "formats",
        ("mp3_over_wav_step_rate_ratio",),
        0.8,
        larger_is_better=True,
        rounds=("mp3_over_wav_step_rate_ratio_rounds",),
    ),
    Goal("P16", "event-loop stall p99 (ms)", "formats", ("event_loop_stall_p99_ms",), 50.0),
    Goal(
        "P17", "text encodes over distinct prompts", "prompt-cache", ("text_encodes_over_distinct_prompts_ratio",), 1.05
    ),
    Goal(
        "P18",
        "overload goodput over peak",
        "overload",
        ("model", "worst_goodput_over_peak_ratio"),
        0.9,
        larger_is_better=True,
    ),
    Goal("P18", "overload refusals p50 (ms)", "overload", ("model", "worst_refusal_p50_ms"), 20.0),
    Goal("P18", "overload refusals p99 (ms)", "overload", ("model", "worst_refusal_p99_ms"), 100.0),
    Goal("P18", "overload normal after (s)", "overload", ("model", "worst_normal_after_s"), 30.0),
    Goal(
        "P18",
        "overload served within four tries (share)",
        "overload",
        ("model", "worst_served_within_four_tries_share"),
        0.95,
        larger_is_better=True,
    ),
)

# Counted without a GPU.
_COUNTED = (
    Goal("P19", "blocking copies in a step", "micro", ("host_blocking_copies_per_step",), 0),
    Goal("P19", "waits in a step", "micro", ("host_waits_per_step",), 0),
    Goal("P19", "asynchronous copies in a step", "micro", ("host_asynchronous_copies_per_step",), 1),
    Goal("P19", "operations that mix devices", "micro", ("host_mix_ups",), 0),
    Goal("P20", "launches per layer of small", "micro", ("launches_per_layer", "small-music"), 25),
    Goal("P20", "graph breaks per layer of small", "micro", ("graph_breaks_per_layer", "small-music"), 0),
    Goal(
        "P23",
        "bfloat16 over float32 on a CPU",
        "bfloat16",
        ("over_float32_ratio",),
        0.33,
        rounds=("over_float32_ratio_rounds",),
    ),
    Goal(
        "P23",
        "four rows together over alone on a CPU",
        "bfloat16",
        ("rows_together_ratio", "float32"),
        1.3,
        larger_is_better=True,
        rounds=("rows_together_ratio_rounds", "float32"),
    ),
    Goal("P23", "two threads over one: throughput", "threads", ("speedup", "2"), 1.67, larger_is_better=True),
)

# By arithmetic: the real scheduler on a model of an H200.
_SIMULATED = (
    Goal(
        "P21",
        "shapes of a day of small-mixed",
        "simulate",
        ("days", "small-mixed", "num_shapes"),
        128,
        count=("days", "small-mixed", "num_requests"),
    ),
    Goal(
        "P21",
        "shapes of a day of medium-mixed",
        "simulate",
        ("days", "medium-mixed", "num_shapes"),
        128,
        count=("days", "medium-mixed", "num_requests"),
    ),
    _simulated("P22", "equal-5s capacity", figure=_CAPACITY, bound=4.0),
    _simulated("P22", "small-8 capacity", figure=_CAPACITY, bound=2.0),
    _simulated("P22", "small-mixed capacity", figure=_CAPACITY, bound=1.4),
    _simulated("P22", "medium-8 capacity", figure=_CAPACITY, bound=1.1),
    _simulated("P22", "sao-100 capacity", figure=_CAPACITY, bound=1.0),
    _simulated("P22", "small-8 p95", figure=_P95, bound=0.6),
    _simulated("P22", "small-mixed p95", figure=_P95, bound=0.5),
    _simulated("P22", "medium-8 p95", figure=_P95, bound=0.75),
    _simulated("P22", "medium-mixed p95", figure=_P95, bound=0.45),
    _simulated("P22", "sao-100 p95", figure=_P95, bound=1.05),
    _simulated("P22", "small-mixed p95 of 8 steps", figure=_P95_8, bound=0.12),
    _simulated("P22", "medium-mixed p95 of 8 steps", figure=_P95_8, bound=0.1),
    _simulated("P22", "small-mixed p95 of 100 steps", figure=_P95_100, bound=1.5),
    _simulated("P22", "medium-mixed p95 of 100 steps", figure=_P95_100, bound=1.5),
    _simulated("P22", "small-mixed packed capacity", figure=_CAPACITY, bound=1.9),
    _simulated("P22", "small-mixed packed p95 of 8 steps", figure=_P95_8, bound=0.06),
    _simulated("P22", "small-8 packed p95", figure=_P95, bound=0.45),
    *(
        Goal(
            "P24",
            f"{clip} clips over TensorRT",
            "simulate",
            ("clips_over_published_ratio", clip, "packed"),
            bound,
            larger_is_better=True,
        )
        for clip, bound in (("small 5 s", 3.0), ("small 30 s", 2.0), ("medium 5 s", 1.5), ("medium 30 s", 1.2))
    ),
)

GOALS: tuple[Goal, ...] = (*_CPU, *_COUNTED, *_SIMULATED)
