"""`python -m benchmarks.page`: docs/performance.md from the committed results, so that no figure is typed by hand."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.cases import run
from benchmarks.cli import CASES, MODES
from benchmarks.goals import GOALS, Standing, read_standings
from benchmarks.gpu.goals import GPU_GOALS
from benchmarks.report import format_cell
from benchmarks.settings import CaseSettings

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"
_DEFAULTS = asdict(CaseSettings())
_RUN_FOLLOWS = ("model", "mode", "threads", "rounds")

_HEAD = """# Performance

Written by `make docs` from [benchmarks/results](../benchmarks/results). Do not edit.

Every figure compares two sides in one run on one machine: the same weights, executor, HTTP path and saved list of
arrivals, in turns. Their audio is compared first, and a side that did other work is refused. `lock` is the pipeline
behind a mutex, one request at a time. `static` is `@serve.batch` over requests of the same length bucket, steps and
guidance: up to 32, after 10 ms. Latency counts from the scheduled arrival to the last byte. A round beside which other
programs used more than a tenth of a core is repeated, and marked as void after the fourth time.

`make bench` measures the short form of the goals in under 12 minutes, `make bench FULL=1` the long form. To compare
with a server of your own: `python -m benchmarks run --against lock,ours --url http://host:port --dialect sa3`.
"""
_GOALS_SAID = """A goal is met by its value. `close`: the range of the rounds reaches the bound. `MISS`: it does not.
Goals of `simulate` are arithmetic on a model of an H200.
"""
_RUN_SAID = {
    "run-demo-fast": "Clips of 1 to 13 s in 8 steps.",
    "run-demo-wide": "The same clips; 30 % of the requests have 50 guided steps.",
}


def render(results: Path = RESULTS) -> str:
    """Returns the page for every machine that has a folder of results."""
    parts = [_HEAD]
    folders = sorted(path for path in results.iterdir() if path.is_dir())
    for folder in folders:
        parts += _machine(folder)
    if not any(folder.name.startswith("gpu") for folder in folders):
        parts.append(
            f"## One H200\n\nNot measured yet. `make bench-gpu` measures it and prints {len(GPU_GOALS)} goals.\n"
        )
    return "\n".join(parts)


def main() -> None:
    """Write the page."""
    PAGE.write_text(render())


def _machine(folder: Path) -> Iterator[str]:
    reports = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    yield f"## {folder.name}\n"
    yield "".join(f"- {line}\n" for line in sorted({_environment(report) for report in reports.values()}))
    yield f"### Goals\n\n{_GOALS_SAID}"
    yield _goals(read_standings(folder, GPU_GOALS if folder.name.startswith("gpu") else GOALS))
    for name in (name for name in reports if name.startswith("run-")):
        yield _comparison(name, reports[name])
    for name, case in CASES.items():
        stems = [stem for stem in ([f"{name}-{mode}" for mode in MODES] if case.by_mode else [name]) if stem in reports]
        if not stems:
            continue
        module = importlib.import_module(f"benchmarks.cases.{case.module}")
        report = reports[stems[0]]
        settings = report["environment"]["settings"] | ({"mode": None} if case.by_mode else {})
        command = _command(name, settings, followed=case.options.split())
        rows = [row for stem in stems for row in module.rows(reports[stem]["results"])]
        yield _section(name, report, command=command, said=(module.__doc__ or "").strip(), rows=rows)


def _comparison(name: str, report: Mapping[str, Any]) -> str:
    results = report["results"]
    options = f"run --mix {results['mix']} --against {','.join(results['sides'])} --count {results['count']}"
    options += f" --goodput-trials {results['goodput_trials']}"
    command = _command(options, report["environment"]["settings"], followed=_RUN_FOLLOWS)
    said = (
        f"{_RUN_SAID.get(name, '')} {results['num_requests']} requests; latencies at {results['rate_hz']:.2f} a "
        f"second, {results['load_share']:g} of the capacity of {results['reference']}; in brackets over it, with the "
        "range of the rounds."
    )
    return _section(name.removeprefix("run-"), report, command=command, said=said, rows=run.rows(results))


def _section(
    name: str, report: Mapping[str, Any], *, command: str, said: str, rows: Sequence[Mapping[str, object]]
) -> str:
    about = report["environment"]
    measured = f"`{command}`, {about['at'][:10]}, commit {about['commit']}"
    return f"### {name}\n\n{said}\n\n{measured}\n\n{_table(rows)}"


def _command(case: str, settings: Mapping[str, Any], *, followed: Iterable[str]) -> str:
    """Returns the command without options that have their default."""
    given = {name: settings[name] for name in followed if name in settings and settings[name] != _DEFAULTS[name]}
    flags = [f"--{name}" if value is True else f"--{name} {value}" for name, value in given.items()]
    return " ".join(["python -m benchmarks", case, *flags])


def _environment(report: Mapping[str, Any]) -> str:
    about = report["environment"]
    versions = ", ".join(f"{package} {version}" for package, version in about["versions"].items() if version)
    machine = about["gpu"] or f"{about['cpu_count']} cores of {about['cpu']}"
    return f"{machine}; Python {about['python']}, {versions}"


def _goals(standings: Sequence[Standing]) -> str:
    return _table(
        [
            {
                "goal": standing.goal.id,
                "what": standing.goal.what,
                "value": "" if standing.value is None else standing.value,
                "bound": f"{standing.goal.sign} {standing.goal.bound:g}",
                "state": standing.verdict,
            }
            for standing in standings
        ]
    )


def _table(rows: Sequence[Mapping[str, object]]) -> str:
    lines: list[list[object]] = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join("| " + " | ".join(format_cell(cell) for cell in line) + " |" for line in lines) + "\n"


if __name__ == "__main__":
    main()
