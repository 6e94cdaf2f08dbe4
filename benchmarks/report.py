"""Writes results as JSON, together with a description of the run's environment, and formats them as tables.

Each finished measurement of a run is stored, too, so that an interrupted run can continue where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_LEAST_EXPONENT = -4  # numbers below this power of ten are printed in scientific notation


def describe_environment(settings: Mapping[str, object]) -> dict[str, Any]:
    """Returns a description of a run: commit, machine, versions of libraries and the given settings."""
    return {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _output("git", "describe", "--always", "--dirty", "--abbrev=12"),
        "python": platform.python_version(),
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "cuda": torch.version.cuda,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"),
        "versions": {name: _version(name) for name in ("torch", "transformers", "numpy", "ray", "fastapi")},
        "settings": dict(settings),
    }


def hash_sources() -> str:
    """Returns a hash of the source files. Unlike the commit, it also changes with uncommitted edits."""
    digest = hashlib.sha256()
    root = Path(__file__).parents[1]
    for folder in ("stable_audio_serve", "benchmarks"):
        for path in sorted((root / folder).rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()


def write_report(folder: Path, case: str, *, settings: Mapping[str, object], results: Mapping[str, Any]) -> None:
    """Write `<case>.json` into `folder`, which is created if missing."""
    folder.mkdir(parents=True, exist_ok=True)
    report = {"case": case, "environment": describe_environment(settings), "results": results}
    write_json(folder / f"{case}.json", report)


class OtherRunError(RuntimeError):
    """The folder has measurements of a run with other options."""


class Pieces:
    """The folder of a run, with a JSON file for each finished measurement. `about` has the options of the run."""

    def __init__(self, folder: Path, about: Mapping[str, object]) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        wanted, path = json.loads(json.dumps(about, default=str)), folder / "about.json"
        there = json.loads(path.read_text()) if path.exists() else wanted
        if other := sorted(name for name in {*there, *wanted} if there.get(name) != wanted.get(name)):
            raise OtherRunError(
                f"{folder} holds a run with other options ({', '.join(other)}): remove it, or choose another --out"
            )
        self.about = wanted

    async def take(self, name: str, measure: Callable[[], Awaitable[Any]]) -> Any:
        """Return the measurement `name` from its file. If there is no file, call `measure` and write the file first."""
        path = self.folder / f"{name}.json"
        if path.exists():
            return json.loads(path.read_text())
        started_at = time.monotonic()
        value = json.loads(json.dumps(await measure()))
        write_json(self.folder / "about.json", self.about)
        write_json(path, value)
        print(f"{name}: measured in {time.monotonic() - started_at:.1f} s", file=sys.stderr, flush=True)
        return value


def write_json(path: Path, value: object) -> None:
    """Replace a file as a whole, so that an interruption leaves no incomplete file."""
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps(value, indent=2, default=str) + "\n")
    draft.rename(path)


def format_table(rows: Iterable[Mapping[str, object]]) -> str:
    """Returns rows as a Markdown table with aligned columns. All rows must have the same keys."""
    table = [{name: format_cell(value) for name, value in row.items()} for row in rows]
    widths = {name: max(len(name), *(len(row[name]) for row in table)) for name in table[0]}
    lines = [dict(zip(widths, widths, strict=True)), {name: "-" * width for name, width in widths.items()}, *table]
    cells = [[line[name].ljust(width) for name, width in widths.items()] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def format_cell(value: object) -> str:
    """Returns the text of a table cell. A fraction below 100 has three significant digits, a larger one no decimals."""
    if not isinstance(value, float) or not math.isfinite(value):
        return str(value)
    if value.is_integer() or abs(value) >= 100:
        return f"{value:.0f}"
    rounded, _, exponent = f"{value:.2e}".partition("e")
    return f"{rounded}e{int(exponent)}" if int(exponent) < _LEAST_EXPONENT else f"{value:.{2 - int(exponent)}f}"


def _output(*command: str) -> str | None:
    """Returns the output of a command, or None if the command cannot be run or fails."""
    try:
        ran = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return ran.stdout.strip()


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
