"""The commands, options, metrics, alerts, figures and files that the pages for operators name all exist."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import typer
import yaml
from typer.core import TyperGroup

from benchmarks.goals import CLIPS, FLOPS
from stable_audio_serve.cli.main import app
from stable_audio_serve.core.metrics import METRICS, exported_name

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = [
    "README.md",
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md")),
]
OPERATIONS = (ROOT / "docs" / "operations.md").read_text()
PROGRAM = "stable-audio-serve"
_BUSY_SHARE = 0.8
UsageError: Any = typer.BadParameter.__base__  # typer has its own copy of click


def commands_of(page: str) -> Iterator[list[str]]:
    """Yield the arguments of each `stable-audio-serve` command on a page, in backticks or at the start of a line."""
    blocks = re.findall(r"```\w*\n(.*?)```", page, flags=re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    found = [line for line in lines if re.match(rf"(\.venv/bin/)?{PROGRAM} ", line)]
    found += re.findall(rf"(?<!`)`({PROGRAM} [^`\n]+)`(?!`)", page)
    for line in found:
        words = shlex.split(re.sub(r"<[\w ]+>", "x", line), comments=True)
        ends = (i for i, word in enumerate(words) if word in ("|", ">", ">>", "&&"))
        yield words[1 : next(ends, None)]


@cache
def commands() -> Any:
    return typer.main.get_command(app)


def fault_of(arguments: list[str]) -> str | None:
    """Returns why a command is invalid (its name, options or arguments are unknown), or None if it is valid."""
    command = commands()
    while isinstance(command, TyperGroup):
        if not arguments or arguments[0].startswith("--"):  # an option of the program itself, such as `--version`
            return None
        name, *arguments = arguments
        if name not in command.commands:
            return f"no command {name}"
        command = command.commands[name]
    if not arguments:  # the page mentions the command without arguments
        return None
    try:
        command.make_context(command.name, list(arguments))
    except UsageError as error:
        return str(error.format_message())
    return None


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.server
def test_commands_exist_and_accept_their_options(page: str) -> None:
    for arguments in commands_of((ROOT / page).read_text()):
        assert fault_of(arguments) is None, shlex.join(arguments)


def test_missing_command_is_found() -> None:
    page = f"`{PROGRAM} jobs show ID`, `{PROGRAM} jobs forget ID`\n```\n{PROGRAM} serve --prot 1 # port\n```"
    assert [fault_of(arguments) is None for arguments in commands_of(page)] == [False, True, False]


def incidents() -> list[list[str]]:
    """Returns the rows of the page's table of incidents: symptom, metrics and remedy."""
    section = OPERATIONS.split("## When something is wrong")[1]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| ")]
    return rows[1:]


def test_metrics_and_alerts_of_incidents_exist() -> None:
    rules = yaml.safe_load((ROOT / "cluster" / "monitoring" / "rules.yaml").read_text())
    alerts = {rule["alert"] for group in rules["groups"] for rule in group["rules"] if "alert" in rule}
    metrics = {exported_name(metric).removeprefix("ray_stable_audio_"): metric for metric in METRICS.values()}
    assert len(incidents()) > 15
    for symptom, watched, _ in incidents():
        for name, labels in re.findall(r"`([a-z_]+_[a-z_]+)(?:\{([^}]*)\})?`", watched):
            if name.startswith(("ray_serve_", "ray_node_")):
                continue  # these are Ray's metrics; the tests of the dashboard check them
            assert name in metrics, symptom
            assert {label.partition("=")[0] for label in labels.split(",") if label} <= set(metrics[name].labels), (
                symptom
            )
    assert set(re.findall(r"StableAudio\w+", OPERATIONS)) == alerts  # every alert has a row with a remedy


def results_of(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())["results"]
    return found


def clips_a_second() -> list[float]:
    """Returns the clips per second that the sizing table should have, computed from the benchmark results."""
    on_gpu = results_of("gpu-h200/gpu-first")
    gpu = [
        on_gpu[f"times-{row.model}"]["clips"][row.name]["roofline_share_crowd"] * FLOPS / row.clip_tflop / 1e12
        for row in CLIPS
        if row.duration_s <= 30
    ]
    threads = [1 / median(results_of("cpu-2-cores/threads")["seconds"][number]) for number in ("1", "2")]
    clips = [results_of("cpu-xeon-2-cores/ggml")["sides"][dtype] for dtype in ("float32", "bfloat16")]
    computed = [1 / (8 * clip["step, 12 s (s)"] + clip["decode, 12 s (s)"]) for clip in clips]
    sides = results_of("cpu-2-cores/run-demo-fast")["sides"]
    return gpu + threads + computed + [median(sides[side]["capacity_rps"]) for side in ("ours-fast", "ours-strict")]


def test_sizes_match_the_results() -> None:
    table = OPERATIONS.split("| One replica of |")[1].split("\n\n")[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("| ")
    ]
    sizes = [[float(cell.replace(",", "")) for cell in (row[2], row[3])] for row in rows if row[2][:1].isdigit()]
    assert all(minute == pytest.approx(clips * 60 * _BUSY_SHARE, rel=0.01) for clips, minute in sizes)
    assert [clips for clips, _ in sizes] == [pytest.approx(clips, rel=0.01) for clips in clips_a_second()]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page: str) -> None:
    for link in re.findall(r"\]\(((?!https?://|#)[^)\s]+)\)", (ROOT / page).read_text()):
        assert ((ROOT / page).parent / link.partition("#")[0]).exists(), link
