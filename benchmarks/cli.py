"""`python -m benchmarks CASE --out DIR`: run one case or all, write JSON files, print their tables. `run` compares our
server with what people would run instead; `bench` is the short form of everything, with a line per goal.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.bench import run_bench
from benchmarks.cases.run import DIALECT_NAMES, RunRequest
from benchmarks.compare.outputs import VoidError
from benchmarks.compare.run import OutOfTimeError
from benchmarks.registry import CASES, MODES, measure_case, measure_comparison
from benchmarks.report import format_table
from benchmarks.settings import CaseSettings
from benchmarks.sides.servers import SIDES
from benchmarks.workload import MIXES


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse and run."""
    options = _parser().parse_args(arguments)
    settings = CaseSettings(
        options.model, options.device, options.mode, options.threads, options.rounds or 3, full=options.full
    )
    if options.case == "bench":
        raise SystemExit(run_bench(settings, out=options.out))
    if options.case == "run":
        try:
            print(format_table(measure_comparison(settings, _run_request(options), out=options.out)))
        except (VoidError, OutOfTimeError, ValueError) as error:
            raise SystemExit(str(error)) from error
        return
    wanted = tuple(CASES) if options.case == "all" else (options.case,)
    for name in wanted:
        if options.engine_only and not CASES[name].is_bare:
            continue
        print(f"\n{name}")
        print(format_table(measure_case(name, settings, out=options.out)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("case", choices=("bench", "run", *CASES, "all"))
    parser.add_argument("--out", type=Path, default=Path("bench-results"), help="folder for the results")
    parser.add_argument("--model", help="registered name or checkpoint folder; default: the demo model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--mode", choices=MODES, help="default: both")
    parser.add_argument("--threads", type=int, default=1, help="model threads")
    parser.add_argument("--rounds", type=int, help="default: 3")
    parser.add_argument("--full", action="store_true", help="as many requests as published figures need")
    parser.add_argument("--engine-only", action="store_true", help="only what runs without Ray and HTTP")
    run = parser.add_argument_group("run")
    run.add_argument("--mix", choices=tuple(MIXES), default="demo-wide")
    run.add_argument("--against", default=None, help=f"sides, the reference first: {','.join(SIDES)}")
    run.add_argument("--url", help="a running server, as a further side or alone")
    run.add_argument("--dialect", choices=DIALECT_NAMES, default="sa3", help="how that server is asked")
    run.add_argument("--url-model", help="the model that server is asked for; default: its own choice")
    run.add_argument("--url-key", help="sent to it as a bearer token")
    run.add_argument("--count", type=int, help="requests of each list")
    run.add_argument("--goodput-trials", type=int, help="steps of the search for the highest good rate; 0: none")
    run.add_argument("--budget-s", type=float, default=float("inf"), help="after this no new measurement begins")
    return parser


def _run_request(options: argparse.Namespace) -> RunRequest:
    against = options.against if options.against is not None else "" if options.url else "lock,static,ours"
    return RunRequest(
        options.mix,
        tuple(filter(None, against.split(","))),
        url=options.url,
        dialect=options.dialect,
        url_model=options.url_model,
        url_key=options.url_key,
        engine_only=options.engine_only,
        count=options.count,
        goodput_trials=options.goodput_trials,
        budget_s=options.budget_s,
    )
