"""`python -m benchmarks CASE --out DIR`: runs one benchmark case, writes its JSON file and prints its table.

The case `run` compares our server with alternatives. `bench` runs the short form of all cases that have goals, except
`threads` and `adapters`, and prints one line for each goal.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import signal
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

from benchmarks.cases import run
from benchmarks.cases.run import RunRequest
from benchmarks.compare import SideFailedError, VoidError
from benchmarks.goals import GOALS, read_standings
from benchmarks.models import CaseSettings
from benchmarks.report import OtherRunError, format_table, write_report
from benchmarks.sides.servers import SIDES
from benchmarks.workload import MIXES
from stable_audio_serve.core.errors import StableAudioError
from stable_audio_serve.core.generation import Mode

Rows = list[dict[str, object]]

_DIALECTS = ("sa3", "saos", "vllm", "aiml", "fal")  # not imported from `dialects`, which needs more packages
# Errors that are printed without a traceback, because their message is sufficient.
_EXPECTED = (VoidError, OtherRunError, SideFailedError, StableAudioError, ValueError, OSError)
_INTERRUPTED = 130


# The settings that each case uses. The case NAME is the module `benchmarks.cases.NAME`, which defines
# `async measure(settings)`, which returns results, and `rows(results)`, which returns them as a table.
CASES: Mapping[str, str] = {
    "engine": "model device mode threads rounds",
    "http": "model device threads rounds full",
    "overload": "model threads rounds full",
    "scale": "model threads rounds full",
    "routing": "model threads rounds full",
    "cold-start": "model device threads rounds",
    "memory": "model device mode threads full",
    "threads": "model rounds",
    "adapters": "model mode threads rounds",
    "ggml": "model threads rounds binary weights",
    "edits": "device threads rounds",
    "simulate": "full",
}
_SIDES = ("lock", "static", "ours-strict", "ours-fast")
_SHORT_RUNS = (
    RunRequest("demo-wide", _SIDES, count=30, goodput_trials=3, goodput_of=("lock", "ours-fast")),
    RunRequest("demo-fast", _SIDES, count=40, goodput_trials=0),
)
_FULL_RUNS = (RunRequest("demo-wide", _SIDES), RunRequest("demo-fast", _SIDES))
# Without `threads` and `adapters`, which take three minutes, and cannot measure a checkpoint folder (--model).
_BENCH_CASES = ("simulate", "memory", "http", "scale", "routing", "overload", "cold-start")


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the arguments and run the case."""
    given = vars(parser().parse_args(arguments))
    case, out = given.pop("case"), given.pop("out")
    settings = CaseSettings(
        **{field.name: given.pop(field.name) for field in fields(CaseSettings) if field.name in given}
    )
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))  # like Ctrl-C: stops servers
    try:
        out.mkdir(parents=True, exist_ok=True)
        if case == "bench":
            raise SystemExit(run_bench(settings, out=out))
        measure = (
            partial(measure_comparison, request=RunRequest(**given)) if case == "run" else partial(measure_case, case)
        )
        print(format_table(measure(settings=settings, out=out)))
    except _EXPECTED as error:
        raise SystemExit(str(error)) from error
    except KeyboardInterrupt:
        raise SystemExit(_INTERRUPTED) from None


def import_case(name: str) -> ModuleType:
    """Returns the module of a case."""
    return importlib.import_module(f"benchmarks.cases.{name.replace('-', '_')}")


def measure_case(name: str, settings: CaseSettings, *, out: Path) -> Rows:
    """Run a case and write its JSON file. Returns the case's table."""
    module = import_case(name)
    results = asyncio.run(module.measure(settings))
    write_report(out, name, settings=asdict(settings), results=results)
    return module.rows(results)


def measure_comparison(settings: CaseSettings, request: RunRequest, *, out: Path) -> Rows:
    """Run the case `run`. Writes the results, the lists of arrivals and a record of every request. Returns a table."""
    name = f"run-{request.mix}"
    results = asyncio.run(run.measure(settings, request, folder=out / name))
    write_report(out, name, settings=asdict(settings), results=results)
    return run.rows(results)


def run_bench(settings: CaseSettings, *, out: Path) -> int:
    """Measure the goals, except those of `threads` and `adapters`. If a case fails, the others still run.

    Returns the exit status: 1 if a goal is missed in all rounds, if a measurement is void, or if a case failed.
    """
    runs, rounds = (_FULL_RUNS, (3, 3)) if settings.full else (_SHORT_RUNS, (2, 1))
    steps: dict[str, Callable[[], Rows]] = {}
    for request in runs:
        steps[f"run {request.mix}"] = partial(measure_comparison, replace(settings, rounds=rounds[0]), request, out=out)
    for name in _BENCH_CASES:
        steps[name] = partial(measure_case, name, replace(settings, rounds=rounds[1]), out=out)
    failed = []
    for number, (name, measure) in enumerate(steps.items(), start=1):
        started_at = time.monotonic()
        try:
            table = format_table(measure())
        except Exception:  # noqa: BLE001 - the other cases are worth having
            traceback.print_exc()
            failed.append(name)
            continue
        print(f"\n{number}/{len(steps)} {name}, {time.monotonic() - started_at:.0f} s\n{table}", flush=True)
    standings = read_standings(out, GOALS)
    lines = "\n".join(map(str, standings))
    (out / "goals.txt").write_text(lines + "\n")
    print("\n".join(["", lines, *(f"{name} failed" for name in failed)]))
    return int(bool(failed) or any(standing.verdict in ("MISS", "void") for standing in standings))


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line, with a subcommand for each case.

    The parsed namespace has only options that were given.
    """
    command = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    cases = command.add_subparsers(dest="case", required=True)
    _add(cases, "bench", options="model threads full")
    for name, options in CASES.items():
        _add(cases, name, options=options)
    own = _add(cases, "run", options="model device mode threads rounds full")
    own.add_argument("--mix", choices=tuple(MIXES), help="default: demo-wide")
    sides = f"sides, the reference first: {','.join(SIDES)}"
    own.add_argument("--against", type=lambda text: tuple(filter(None, text.split(","))), help=sides)
    own.add_argument("--engine-only", action="store_true", help="the sides in this process, without Ray and HTTP")
    own.add_argument("--url", help="a running server, as a further side or alone")
    own.add_argument("--dialect", choices=_DIALECTS, help="how that server is asked; default: sa3")
    own.add_argument("--url-model", help="the model that server is asked for; default: its own choice")
    own.add_argument("--url-key", help="sent to it as a bearer token")
    own.add_argument("--count", type=int, help="requests of each list")
    own.add_argument("--goodput-trials", type=int, help="steps of the search for the highest good rate; 0: none")
    return command


def _add(cases: Any, name: str, *, options: str) -> argparse.ArgumentParser:
    case: argparse.ArgumentParser = cases.add_parser(name, argument_default=argparse.SUPPRESS)
    case.add_argument("--out", type=Path, default=Path("bench-results"), help="folder; default: bench-results")
    known: dict[str, dict[str, Any]] = {
        "model": {"help": "registered name or checkpoint folder; default: the demo model"},
        "device": {"help": "default: cpu"},
        "mode": {"choices": get_args(Mode), "help": "default: both, or the device's own"},
        "threads": {"type": int, "help": "model threads; default: 1"},
        "rounds": {"type": _at_least_one, "help": "default: 3"},
        "full": {"action": "store_true", "help": "as many requests as published figures need"},
        "binary": {"help": "sa3.cpp's program sa3-generate; default: measure only this engine"},
        "weights": {"help": "checkpoint folder, with sa3.cpp's GGUF files of the same weights"},
    }
    for option in options.split():
        case.add_argument(f"--{option}", **known[option])
    return case


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)
