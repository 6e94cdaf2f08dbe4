"""Every goal that this machine can show, one after another, then a line per goal. A case that fails does not end the
rest; a comparison that was cut goes on where it stopped.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from benchmarks.cases.run import RunRequest
from benchmarks.goals import has_missed, read_standings
from benchmarks.registry import measure_case, measure_comparison
from benchmarks.report import format_table
from benchmarks.settings import CaseSettings
from stable_audio_serve.core.processor import has_native_bfloat16

_SIDES = ("lock", "static", "ours-strict", "ours-fast")
_SHORT_RUN_ROUNDS, _SHORT_CASE_ROUNDS = 2, 1
_SHORT_RUNS = (
    RunRequest("demo-wide", _SIDES, count=30, goodput_trials=3, goodput_of=("lock", "ours-fast")),
    RunRequest("demo-fast", _SIDES, count=40, goodput_trials=0),
)
_FULL_RUNS = (RunRequest("demo-wide", _SIDES), RunRequest("demo-fast", _SIDES))
BENCH_CASES = (
    "simulate",
    "micro",
    "ladder",
    "memory",
    "prompt-cache",
    "http",
    "formats",
    "scale",
    "routing",
    "overload",
    "cold-start",
    *(("bfloat16",) if has_native_bfloat16() else ()),
)


def run_bench(settings: CaseSettings, *, rounds: int | None, out: Path) -> int:
    """Returns the exit status: 1 if a goal is missed by its whole interval, is void, or a case failed.

    `rounds` None: those of the settings in the long form, one or two in the short one.
    """

    def with_rounds(short: int) -> CaseSettings:
        return replace(settings, rounds=rounds or (settings.rounds if settings.full else short))

    def compare_sides(request: RunRequest) -> list[dict[str, object]]:
        return measure_comparison(with_rounds(_SHORT_RUN_ROUNDS), request, out=out)

    def measure(name: str) -> list[dict[str, object]]:
        return measure_case(name, with_rounds(_SHORT_CASE_ROUNDS), out=out)

    steps: dict[str, Callable[[], list[dict[str, object]]]] = {}
    for request in _FULL_RUNS if settings.full else _SHORT_RUNS:
        steps[f"run {request.mix}"] = lambda request=request: compare_sides(request)  # type: ignore[misc]
    for name in BENCH_CASES:
        steps[name] = lambda name=name: measure(name)  # type: ignore[misc]
    failed = _run_all(steps)
    standings = read_standings(out)
    lines = "\n".join(str(standing) for standing in standings)
    (out / "goals.txt").write_text(lines + "\n")
    print(f"\n{lines}")
    for name in failed:
        print(f"{name} failed")
    return 1 if failed or has_missed(standings) else 0


def _run_all(steps: Mapping[str, Callable[[], list[dict[str, object]]]]) -> list[str]:
    """Returns the names of those that failed."""
    failed = []
    for number, (name, run) in enumerate(steps.items(), start=1):
        started_at = time.monotonic()
        try:
            table = format_table(run())
        except Exception:  # noqa: BLE001 - the other cases are worth having
            traceback.print_exc()
            failed.append(name)
            continue
        print(f"\n{number}/{len(steps)} {name}, {time.monotonic() - started_at:.0f} s\n{table}")
        sys.stdout.flush()
    return failed
