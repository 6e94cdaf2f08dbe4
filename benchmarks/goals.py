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
    rounds = [] if goal.rounds is None else _find(results, goal.rounds) or []
    values = [float(found), *map(float, rounds)]
    return Standing(goal, values[0], min(values), max(values), is_void, count)


def _find(results: Any, path: Sequence[str]) -> Any:
    for name in path:
        if not isinstance(results, Mapping) or results.get(name) is None:
            return None
        results = results[name]
    return results


def _number(value: float) -> str:
    if abs(value) >= 100 or value == int(value):
        return f"{value:.0f}"
    return f"{value:.2f}" if value >= 0.1 else f"{value:.3f}"


def _run(id: str, mix: str, *, figure: str, side: str = "ours-fast", over: str = "lock", bound: float) -> Goal:
    mode, steps = side.removeprefix("ours-"), figure.removeprefix("p95_")
    words = f"p95 of {steps} steps" if steps != figure else figure
    what = f"{mix} {mode} {words}{'' if over == 'lock' else f' over {over}'}"
    path, larger_is_better = ("ratios", side, over, figure), figure in ("capacity", "goodput")
    return Goal(id, what, f"run-{mix}", path, bound, larger_is_better, count=("num_requests",))


def _simulated(mix: str, *, figure: str, bound: float) -> Goal:
    """By arithmetic: the real scheduler on a model of an H200."""
    steps = figure.removeprefix("p95_")
    what = f"{mix} {f'p95 of {steps} steps' if steps != figure else figure}, simulated"
    path = ("mixes", mix, "packed", f"{figure}_over_lock_ratio")
    return Goal("P22", what, "simulate", path, bound, figure == "capacity", count=("mixes", mix, "num_requests"))


def _case(id: str, what: str, *, case: str, path: str, bound: float, larger_is_better: bool = False) -> Goal:
    """`path` is dotted; where the last name has a sibling ending in `_rounds`, that is the interval."""
    *parents, last = path.split(".")
    return Goal(id, what, case, (*parents, last), bound, larger_is_better, rounds=(*parents, f"{last}_rounds"))


GOALS: tuple[Goal, ...] = (
    _run("P1", "demo-wide", figure="capacity", bound=1.4),
    _run("P1", "demo-fast", figure="capacity", bound=1.2),
    _run("P1", "demo-wide", side="ours-strict", figure="capacity", bound=0.97),
    _run("P1", "demo-fast", side="ours-strict", figure="capacity", bound=0.97),
    _run("P2", "demo-wide", figure="capacity", over="static", bound=1.1),
    _run("P2", "demo-fast", figure="capacity", over="static", bound=1.1),
    _run("P4", "demo-wide", figure="p95", bound=0.7),
    _run("P4", "demo-fast", figure="p95", bound=0.9),
    _run("P4", "demo-wide", side="ours-strict", figure="p95", bound=1.05),
    _run("P5", "demo-wide", figure="p95_8", bound=0.3),
    _run("P5", "demo-wide", figure="p95_50", bound=1.5),
    _run("P5", "demo-wide", side="ours-strict", figure="p95_8", bound=0.3),
    _run("P5", "demo-wide", side="ours-strict", figure="p95_50", bound=1.7),
    _run("P6", "demo-wide", figure="goodput", bound=1.2),
    _case(
        "P7", "lone request in process over what is allowed", case="http", path="engine_over_allowed_ratio", bound=1.0
    ),
    _case("P7", "lone request over HTTP over what is allowed", case="http", path="http_over_allowed_ratio", bound=1.0),
    _case("P11", "memory growth", case="memory", path="memory_rss_growth_share", bound=0.02),
    _case("P14", "cold start", case="cold-start", path="first_audio_over_ray_plus_bare_ratio", bound=2.0),
    *(
        _case(
            "P15",
            what,
            case="scale",
            path=f"{side}.worst_capacity_over_one.{count}",
            bound=bound,
            larger_is_better=True,
        )
        for what, side, count, bound in (
            ("2 stand-in replicas", "stand_in", 2, 1.9),
            ("4 stand-in replicas", "stand_in", 4, 3.6),
            ("2 demo replicas", "model", 2, 1.6),
        )
    ),
    _case(
        "P25",
        "small-mixed p95 by predicted work over Serve's router",
        case="routing",
        path="p95_over_serve_ratio",
        bound=0.8,
    ),
    *(
        _case(
            "P18", f"overload {what}", case="overload", path=f"model.worst_{name}", bound=bound, larger_is_better=larger
        )
        for what, name, bound, larger in (
            ("goodput over peak", "goodput_over_peak_ratio", 0.9, True),
            ("refusals p50 (ms)", "refusal_p50_ms", 20.0, False),
            ("refusals p99 (ms)", "refusal_p99_ms", 100.0, False),
            ("normal after (s)", "normal_after_s", 30.0, False),
            ("served within four tries (share)", "served_within_four_tries_share", 0.95, True),
        )
    ),
    _case(
        "P23", "two threads over one: throughput", case="threads", path="speedup.2", bound=1.67, larger_is_better=True
    ),
    _simulated("small-mixed", figure="capacity", bound=1.9),
    _simulated("small-mixed", figure="p95", bound=0.5),
    _simulated("small-mixed", figure="p95_8", bound=0.06),
    _simulated("small-mixed", figure="p95_100", bound=1.5),
    _simulated("medium-mixed", figure="p95", bound=0.45),
    _simulated("medium-mixed", figure="p95_8", bound=0.1),
    _simulated("medium-mixed", figure="p95_100", bound=1.5),
)
