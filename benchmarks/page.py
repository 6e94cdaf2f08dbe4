"""`python -m benchmarks.page`: writes the results in benchmarks/results to its README.md and to docs/performance.md.

README.md has all figures and goals, docs/performance.md the most important figures.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.cases import ggml, run
from benchmarks.cli import CASES, import_case
from benchmarks.goals import GOALS, GPU_GOALS, read_standings
from benchmarks.report import format_cell
from benchmarks.settings import CaseSettings

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = RESULTS / "README.md"
SUMMARY = ROOT / "docs" / "performance.md"
_SUMMARIZED = RESULTS / "cpu-2-cores"
_GGML = RESULTS / "cpu-xeon-2-cores" / "ggml.json"
_DEFAULTS = asdict(CaseSettings())
_RUN_FOLLOWS = ("model", "mode", "threads", "rounds")

_HEAD = """# Results

`make docs` writes this page from the files in this folder. Do not edit it.

A comparison measures its sides in alternation, in one run on one machine. The sides have the same weights, executor
and HTTP path, and receive the same requests at the same times. Before measuring, the run compares the audio of the
sides and stops if one of them did different work. `lock` is the pipeline behind a mutex, one request at a time.
`static` is `@serve.batch`: it waits 10 ms for up to 32 requests with the same length bucket, steps and guidance.
Latency is the time from a request's scheduled arrival to the last byte of its answer. A round during which other
programs used more than a tenth of a core is repeated; after four such attempts it is marked as void.

`make bench` measures the short form of the goals in about 15 minutes, `make bench FULL=1` the long form, both without
the goals of `threads` and `adapters`. To compare with another server:
`python -m benchmarks run --against lock,ours --url http://host:port --dialect sa3`.
"""
_GOALS_SAID = """`ok`: the value meets the bound. `close`: the value misses it, but the range of the rounds reaches it.
`MISS`: the whole range misses it. Goals of `simulate` are computed with a model of an H200.
"""
_SERVERS = {
    "lock": "one request at a time",
    "static": "static batches (`@serve.batch`)",
    "ours-strict": "this server, `mode: strict`",
    "ours-fast": "this server, `mode: fast`",
}
_MIXES = {"demo-fast": "all with 8 steps", "demo-wide": "70 % with 8 steps, 30 % with 50 guided steps"}
_RUN_SAID = {
    "run-demo-fast": "Clips of 1 to 13 s in 8 steps.",
    "run-demo-wide": "The same clips; 30 % of the requests have 50 guided steps.",
}


def render(results: Path = RESULTS) -> str:
    """Returns the text of README.md, with a section for every machine that has a folder of results."""
    parts = [_HEAD]
    for folder in sorted(path for path in results.iterdir() if path.is_dir()):
        parts += _machine(folder)
    return "\n".join(parts)


def fill(text: str, folder: Path = _SUMMARIZED) -> str:
    """Returns the text of docs/performance.md with tables from the results in a folder."""
    results = {path.stem: json.loads(path.read_text())["results"] for path in folder.glob("*.json")}
    tables: dict[str, Iterable[Mapping[str, object]]] = {
        "servers": _servers(results),
        "figures": _figures(results),
        "edits": _edits(results["edits"]),
        "ggml": ggml.rows(json.loads(_GGML.read_text())["results"]),
    }
    for name, rows in tables.items():
        table = f"<!-- {name} -->\n\n{_table(list(rows))}\n<!-- end -->"
        before, rest = text.split(f"<!-- {name} -->")
        text = before + table + rest.partition("<!-- end -->")[2]
    return text


def main() -> None:
    """Write benchmarks/results/README.md, and the tables of docs/performance.md."""
    PAGE.write_text(render())
    SUMMARY.write_text(fill(SUMMARY.read_text()))


def _servers(results: Mapping[str, Any]) -> Iterator[Mapping[str, object]]:
    for mix, said in _MIXES.items():
        for side, figures in results[f"run-{mix}"]["sides"].items():
            latency = figures["latency"]
            yield {
                "Requests for 1 to 13 s": said,
                "Server": _SERVERS[side],
                "Clips a second": f"{median(figures['capacity_rps']):.1f}",
                "p95, all": f"{latency['all']['p95_ms'] / 1000:.2f} s",
                "p95, 8 steps": f"{latency.get('8', latency['all'])['p95_ms'] / 1000:.2f} s",
            }


def _figures(results: Mapping[str, Any]) -> Iterator[Mapping[str, object]]:
    http, overload, threads = results["http"], results["overload"]["model"], results["threads"]
    for what, value in {
        "time from the command `serve` until the demo model is ready": f"{results['cold-start']['ready_s']:.0f} s",
        "latency of a 10 s clip of the demo model over HTTP": f"{http['http']['p50_ms']:.0f} ms",
        "time for the same clip without server and HTTP": f"{http['bare']['p50_ms']:.0f} ms",
        "goodput at three times the capacity, divided by the best goodput": (
            f"{overload['worst_goodput_over_peak_ratio']:.0%}"
        ),
        "median latency of a refusal at three times the capacity": f"{overload['worst_refusal_p50_ms']:.0f} ms",
        "p95 latency with routing by predicted work, divided by that with Ray Serve's router": (
            f"{results['routing']['p95_over_serve_ratio']:.2f}"
        ),
        "compute time per second of audio, one thread (small-music, 10 s, random weights)": (
            f"{threads['work_s_per_audio_s']['1']:.2f} s"
        ),
        "compute time per second of audio, two threads": f"{threads['work_s_per_audio_s']['2']:.2f} s",
    }.items():
        yield {"What": what, "Value": value}


def _edits(results: Mapping[str, Any]) -> Iterator[Mapping[str, object]]:
    shares = {name: figures["kept"] / figures["clips"] for name, figures in results["by_schedule"].items()}
    levels = dict.fromkeys(name.split()[1] for name in shares)
    for schedule in dict.fromkeys(name.split()[0] for name in shares):
        kept = {f"Strength {level}": f"{shares[f'{schedule} {level}']:.0%}" for level in levels}
        yield {"`edit_schedule`": f"`{schedule}`", **kept}


def _machine(folder: Path) -> Iterator[str]:
    reports = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    yield f"## {folder.name}\n"
    yield "".join(f"- {line}\n" for line in sorted({_environment(report) for report in reports.values()}))
    goals = GPU_GOALS if folder.name.startswith("gpu") else [goal for goal in GOALS if goal.case in reports]
    if goals:
        yield f"### Goals\n\n{_GOALS_SAID}"
        yield _table(
            [
                {
                    "goal": standing.goal.id,
                    "what": standing.goal.what,
                    "value": "" if standing.value is None else standing.value,
                    "bound": f"{standing.goal.sign} {standing.goal.bound:g}",
                    "state": standing.verdict,
                }
                for standing in read_standings(folder, goals)
            ]
        )
    for name in (name for name in reports if name.startswith("run-")):
        yield _comparison(name, reports[name])
    for name, options in CASES.items():
        if name in reports:
            module, report = import_case(name), reports[name]
            command = _command(name, report["environment"]["settings"], followed=options.split())
            said, rows = (module.__doc__ or "").strip(), module.rows(report["results"])
            yield _section(name, report, command=command, said=said, rows=rows)


def _comparison(name: str, report: Mapping[str, Any]) -> str:
    results = report["results"]
    options = f"run --mix {results['mix']} --against {','.join(results['sides'])} --count {results['count']}"
    options += f" --goodput-trials {results['goodput_trials']}"
    command = _command(options, report["environment"]["settings"], followed=_RUN_FOLLOWS)
    said = (
        f"{_RUN_SAID.get(name, '')} {results['num_requests']} requests. Latencies are measured at "
        f"{results['rate_hz']:.2f} requests a second, {results['load_share']:g} of the capacity of "
        f"`{results['reference']}`. In brackets: the ratio to `{results['reference']}`, with the range of the rounds."
    )
    return _section(name.removeprefix("run-"), report, command=command, said=said, rows=run.rows(results))


def _section(
    name: str, report: Mapping[str, Any], *, command: str, said: str, rows: Sequence[Mapping[str, object]]
) -> str:
    about = report["environment"]
    measured = f"`{command}`, {about['at'][:10]}, commit {about['commit']}"
    note = f". {about['note']}" if "note" in about else ""
    return f"### {name}\n\n{said}\n\n{measured}{note}\n\n{_table(rows)}"


def _command(case: str, settings: Mapping[str, Any], *, followed: Iterable[str]) -> str:
    """Returns the command line that measures a case with these settings. Options with default values are left out."""
    given = {name: settings[name] for name in followed if name in settings and settings[name] != _DEFAULTS[name]}
    flags = [f"--{name}" if value is True else f"--{name} {value}" for name, value in given.items()]
    return " ".join(["python -m benchmarks", case, *flags])


def _environment(report: Mapping[str, Any]) -> str:
    about = report["environment"]
    versions = ", ".join(f"{package} {version}" for package, version in about["versions"].items() if version)
    machine = about["gpu"] or f"{about['cpu_count']} cores of {about['cpu']}"
    return f"{machine}; Python {about['python']}, {versions}"


def _table(rows: Sequence[Mapping[str, object]]) -> str:
    lines: list[list[object]] = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join("| " + " | ".join(format_cell(cell) for cell in line) + " |" for line in lines) + "\n"


if __name__ == "__main__":
    main()
