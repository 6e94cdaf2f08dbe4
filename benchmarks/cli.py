"""`python -m benchmarks CASE --out DIR`: run one case or all, write JSON files, print their tables. `run` compares our
server with what people would run instead; `bench` is the short form of everything, with a line per goal.
"""

from __future__ import annotations

import argparse
import signal
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import FrameType
from typing import Any

from benchmarks.bench import BENCH_CASES, run_bench
from benchmarks.cases.run import DIALECT_NAMES, RunRequest
from benchmarks.compare.outputs import VoidError
from benchmarks.compare.pieces import OtherRunError
from benchmarks.compare.run import OutOfTimeError, SideFailedError
from benchmarks.registry import CASES, MODES, measure_case, measure_comparison
from benchmarks.report import format_table
from benchmarks.settings import CaseSettings
from benchmarks.sides.servers import SIDES
from benchmarks.workload import MIXES
from stable_audio_serve.core.errors import StableAudioError

_SETTINGS = frozenset(field.name for field in fields(CaseSettings))
_RUN = frozenset(field.name for field in fields(RunRequest))
# What needs no traceback: the words say what to do.
_TOLD = (VoidError, OutOfTimeError, OtherRunError, SideFailedError, StableAudioError, ValueError, OSError)
_INTERRUPTED = 130
# Options of `run` that change nothing unless another one is there too.
_NEEDS = {
    "dialect": "--url",
    "url_model": "--url",
    "url_key": "--url",
    "mode": "--against",
    "threads": "--against",
    "engine_only": "--against",
    "device": "--engine-only",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse and run."""
    command = parser()
    given = vars(command.parse_args(arguments))
    case, out = given.pop("case"), given.pop("out", Path("bench-results"))
    for name in given:
        if refusal := refuse(case, name, given=given):
            command.error(refusal)
    signal.signal(signal.SIGTERM, _end)
    try:
        out.mkdir(parents=True, exist_ok=True)
        raise SystemExit(_run_case(case, given, out=out))
    except _TOLD as error:
        raise SystemExit(str(error)) from error
    except KeyboardInterrupt:
        raise SystemExit(_INTERRUPTED) from None


def _run_case(case: str, given: Mapping[str, object], *, out: Path) -> int:
    """Returns the exit status. Raises what is to be told and what is a fault."""
    values: dict[str, Any] = dict(given)
    settings = CaseSettings(**{name: value for name, value in values.items() if name in _SETTINGS})
    if case == "bench":
        return run_bench(settings, rounds=values.get("rounds"), out=out)
    if case == "run":
        asked = {name: value for name, value in values.items() if name in _RUN}
        print(format_table(measure_comparison(settings, _run_request(**asked), out=out)))
        return 0
    for name in _chosen(case, given=given):
        print(f"\n{name}")
        print(format_table(measure_case(name, settings, out=out)))
    return 0


def _end(number: int, frame: FrameType | None) -> None:
    """As Ctrl-C does: servers that were started are stopped."""
    interrupt = signal.getsignal(signal.SIGINT)
    if not callable(interrupt):  # ignored, as in the background of a shell
        raise KeyboardInterrupt
    interrupt(signal.SIGINT, frame)


def refuse(case: str, option: str, *, given: Mapping[str, object]) -> str | None:
    """Returns what to say of an option that would change nothing, None for one that is used."""
    flag = "--" + option.replace("_", "-")
    if case == "run":
        has_sides = bool(given["against"]) if "against" in given else "url" not in given
        met = {"--url": "url" in given, "--against": has_sides, "--engine-only": "engine_only" in given}
        needed = _NEEDS.get(option)
        return None if needed is None or met[needed] else f"run does not use {flag} without {needed}"
    if case == "all" and option == "engine_only":
        return None
    names = BENCH_CASES if case == "bench" else _chosen(case, given=given)
    used = {option for name in names for option in CASES[name].options.split()}
    return None if option in used else f"{case} does not use {flag}"


def _chosen(case: str, *, given: Mapping[str, object]) -> list[str]:
    if case != "all":
        return [case]
    return [name for name in CASES if CASES[name].is_bare or "engine_only" not in given]


def _run_request(mix: str = "demo-wide", *, against: tuple[str, ...] | None = None, **asked: object) -> RunRequest:
    if against is None:
        against = () if "url" in asked else ("lock", "static", "ours")
    return RunRequest(mix, against, **asked)  # type: ignore[arg-type]  # as parsed


def parser() -> argparse.ArgumentParser:
    """A parser that returns nothing but what was given."""
    command = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, argument_default=argparse.SUPPRESS
    )
    command.add_argument("case", choices=("bench", "run", *CASES, "all"))
    command.add_argument("--out", type=Path, help="folder for the results; default: bench-results")
    command.add_argument("--model", help="registered name or checkpoint folder; default: the demo model")
    command.add_argument("--device", help="default: cpu")
    command.add_argument("--mode", choices=MODES, help="default: both")
    command.add_argument("--threads", type=_positive, help="model threads; default: 1")
    command.add_argument("--rounds", type=_positive, help="default: 3; of bench without --full: 1 or 2, by case")
    command.add_argument("--full", action="store_true", help="as many requests as published figures need")
    command.add_argument(
        "--engine-only", action="store_true", help="of run and all: only what needs no Ray and no HTTP"
    )
    run = command.add_argument_group("run")
    run.add_argument("--mix", choices=tuple(MIXES), help="default: demo-wide")
    run.add_argument("--against", type=_parse_sides, help=f"sides, the reference first: {','.join(SIDES)}")
    run.add_argument("--url", help="a running server, as a further side or alone")
    run.add_argument("--dialect", choices=DIALECT_NAMES, help="how that server is asked; default: sa3")
    run.add_argument("--url-model", help="the model that server is asked for; default: its own choice")
    run.add_argument("--url-key", help="sent to it as a bearer token")
    run.add_argument("--count", type=_positive, help="requests of each list")
    run.add_argument("--goodput-trials", type=_count, help="steps of the search for the highest good rate; 0: none")
    run.add_argument("--budget-s", type=float, help="after this no new measurement begins")
    return command


def _positive(text: str) -> int:
    if (value := _count(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return value


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is no number of things")
    return int(text)


def _parse_sides(text: str) -> tuple[str, ...]:
    return tuple(filter(None, text.split(",")))
