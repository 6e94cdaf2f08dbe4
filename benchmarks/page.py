"""`python -m benchmarks.page`: docs/performance.md from the committed results, so that no figure is typed by hand."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import scaling
from benchmarks.compare.pictures import format_comparison
from benchmarks.goals import GOALS, Standing, read_standings
from benchmarks.gpu.goals import GPU_GOALS
from benchmarks.registry import CASES, MODES
from benchmarks.report import format_cell
from benchmarks.settings import CaseSettings

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
_DEFAULTS = asdict(CaseSettings())
_RUN_FOLLOWS = ("model", "mode", "threads", "rounds")
PAGE = ROOT / "docs" / "performance.md"

_HEAD = """# Performance

Written by `make docs` from the files in [benchmarks/results](../benchmarks/results). Do not edit.

Every claim is a ratio of two sides measured in one run on one machine: the same weights, the same executor, the same
HTTP path and the same saved list of arrivals, in turns. Outputs are compared first; a side that does other work is
void. `lock` is the pipeline behind a mutex, one request at a time. `static` is `@serve.batch` over requests with the
same length bucket, steps and guidance, 32 at most, waiting 10 ms. Latency counts from the scheduled arrival to the last
byte. A round beside which other programs used more than a tenth of a core is void and repeated.

`make bench` measures the short form of everything here in minutes, `make bench FULL=1` the long one. To compare with a
server of your own: `python -m benchmarks run --mix demo-wide --against lock,ours --url http://host:port --dialect sa3`.
Each table stands below the command that measures it.
"""


def render(results: Path = RESULTS) -> str:
    """Returns the page for every machine that has a folder of results."""
    parts = [_HEAD]
    for folder in sorted(path for path in results.iterdir() if path.is_dir()):
        parts += _machine(folder)
    if not any(path.name.startswith("gpu") for path in results.iterdir()):
        parts += [
            "## One H200\n",
            "Not measured yet: `make bench-gpu`.\n",
            _goals([Standing(goal) for goal in GPU_GOALS]),
        ]
    return "\n".join(parts)


def main() -> None:
    """Write this page and the one on scaling."""
    PAGE.write_text(render())
    scaling.PAGE.write_text(scaling.render())


def _machine(folder: Path) -> Iterator[str]:
    reports = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    yield f"## {folder.name}\n"
    yield _environment(reports)
    yield "### Goals\n"
    yield (
        "A goal is met by its value; `close` means that its interval, the range of the rounds, still reaches the "
        "bound, `MISS` that it does not. P21, P22 and P24 are arithmetic: the engine's own scheduling on a model of "
        "an H200. What needs a GPU and has not been measured says so.\n"
    )
    yield _goals(read_standings(folder, GPU_GOALS if folder.name.startswith("gpu") else GOALS))
    for name, report in reports.items():
        if name.startswith("run-"):
            yield f"### {name.removeprefix('run-')}: all sides\n"
            yield _command(run_options(report["results"]), report["environment"]["settings"], followed=_RUN_FOLLOWS)
            yield format_comparison(report["results"])
    for name, case in CASES.items():
        module = importlib.import_module(f"benchmarks.cases.{case.module}")
        stems = [f"{name}-{mode}" for mode in MODES] if case.by_mode else [name]
        rows = [row for stem in stems if stem in reports for row in module.rows(reports[stem]["results"])]
        if rows:
            yield f"### {name}\n"
            settings = next(reports[stem] for stem in stems if stem in reports)["environment"]["settings"]
            mode = {} if len(stems) == 1 else {"mode": None}  # both of them
            yield _command(name, {**settings, **mode}, followed=case.options.split())
            yield f"{(module.__doc__ or '').strip()}\n"
            yield _table([list(rows[0])], [list(row.values()) for row in rows])


def run_options(results: Mapping[str, Any]) -> str:
    """Returns the case and the options that compare these sides again."""
    options = f"run --mix {results['mix']} --against {','.join(results['sides'])} --count {results['count']}"
    return f"{options} --goodput-trials {results['goodput_trials']}"


def _command(case: str, settings: Mapping[str, Any], *, followed: Iterable[str]) -> str:
    """Returns what was typed: options that have their default are left out."""
    given = {name: settings[name] for name in followed if name in settings and settings[name] != _DEFAULTS[name]}
    flags = [f"--{name}" if value is True else f"--{name} {value}" for name, value in given.items()]
    return f"`{' '.join(['python -m benchmarks', case, *flags])}`\n"


def _environment(reports: Mapping[str, Mapping[str, Any]]) -> str:
    lines = []
    for name, report in reports.items():
        about = report["environment"]
        versions = ", ".join(f"{package} {version}" for package, version in about["versions"].items() if version)
        machine = about["gpu"] or f"{about['cpu_count']} cores of {about['cpu']}"
        lines.append([name, about["at"][:10], about["commit"], machine, f"Python {about['python']}, {versions}"])
    return _table([["file", "measured", "commit", "machine", "with"]], lines)


def _goals(standings: Sequence[Standing]) -> str:
    rows: list[list[object]] = []
    for standing in standings:
        goal = standing.goal
        value = "" if standing.value is None else format_cell(standing.value)
        interval = (
            "" if standing.low == standing.high else f"{format_cell(standing.low)} to {format_cell(standing.high)}"
        )
        rows.append(
            [goal.id, goal.what, value, interval, standing.count or "", f"{goal.sign} {goal.bound:g}", standing.verdict]
        )
    return _table([["goal", "what", "value", "rounds", "n", "bound", "state"]], rows)


def _table(head: Sequence[Sequence[object]], rows: Sequence[Sequence[object]]) -> str:
    lines = [*head, ["---"] * len(head[0]), *rows]
    return "\n".join("| " + " | ".join(format_cell(cell) for cell in line) + " |" for line in lines) + "\n"


if __name__ == "__main__":
    main()
