"""`python -m benchmarks.page`: writes the results in benchmarks/results to its README.md and to docs/performance.md.

README.md has all figures and goals, docs/performance.md the most important figures. On both pages, the text between
`<!-- NAME -->` and `<!-- end -->` comes from the results.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.cases import run
from benchmarks.cli import CASES, import_case
from benchmarks.goals import GOALS, GPU_GOALS, read_standings
from benchmarks.models import CaseSettings
from benchmarks.report import format_table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (RESULTS / "README.md", ROOT / "docs" / "performance.md")
_DEFAULTS = asdict(CaseSettings())
_RUN_FOLLOWS = ("model", "mode", "threads", "rounds")
_SERVERS = {
    "lock": "one request at a time",
    "static": "static batches (`@serve.batch`)",
    "ours-strict": "this server, `mode: strict`",
    "ours-fast": "this server, `mode: fast`",
}
_MIXES = {"demo-fast": "all with 8 steps", "demo-wide": "70 % with 8 steps, 30 % with 50 guided steps"}


def main() -> None:
    """Write the results to both pages."""
    for page in PAGES:
        page.write_text(fill(page.read_text()))


def fill(text: str) -> str:
    """Returns the text of a page with the current results."""

    def write(found: re.Match[str]) -> str:
        return f"<!-- {found[1]} -->\n\n{_block(found[1])}\n\n<!-- end -->"

    return re.sub(r"<!-- ([\w/-]+) -->\n.*?<!-- end -->", write, text, flags=re.DOTALL)


def _block(block: str) -> str:
    """Returns the block `FOLDER/NAME` with results of one machine, or for `FOLDER/NAME/table`, only its table."""
    folder, name, *part = block.split("/")
    reports = {path.stem: json.loads(path.read_text()) for path in sorted((RESULTS / folder).glob("*.json"))}
    results = {case: report["results"] for case, report in reports.items()}
    if name == "machine":
        return "\n".join(f"- {line}" for line in sorted(set(map(_environment, reports.values()))))
    if name == "goals":
        return format_table(_goals(RESULTS / folder))
    if name in _SUMMARIES:
        return format_table(_SUMMARIES[name](results))
    about, note = reports[name]["environment"], ""
    if name.startswith("run-"):
        command, table = _run_command(results[name], about["settings"]), format_table(run.rows(results[name]))
        note = f". {results[name]['num_requests']} requests; latencies at {results[name]['rate_hz']:.2f} a second"
    else:
        command = _command(name, about["settings"], followed=CASES[name].split())
        table = format_table(import_case(name).rows(results[name]))
    note += f". {about['note']}" if "note" in about else ""
    return table if part else f"`{command}`, {about['at'][:10]}, commit {about['commit']}{note}\n\n{table}"


def _goals(folder: Path) -> Iterator[Mapping[str, object]]:
    goals = GPU_GOALS if folder.name.startswith("gpu") else GOALS
    for standing in read_standings(folder, goals):
        if standing.goal.case in {path.stem for path in folder.glob("*.json")}:
            yield {
                "goal": standing.goal.id,
                "what": standing.goal.what,
                "value": "" if standing.value is None else standing.value,
                "bound": f"{standing.goal.sign} {standing.goal.bound:g}",
                "state": standing.verdict,
            }


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


_SUMMARIES = {"servers": _servers, "figures": _figures}  # tables that only docs/performance.md has


def _run_command(results: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    options = f"run --mix {results['mix']} --against {','.join(results['sides'])} --count {results['count']}"
    options += f" --goodput-trials {results['goodput_trials']}"
    return _command(options, settings, followed=_RUN_FOLLOWS)


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


if __name__ == "__main__":
    main()
