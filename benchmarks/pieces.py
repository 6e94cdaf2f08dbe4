"""Stores each finished measurement of a run as a file, so that an interrupted run can continue where it stopped."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any


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
    draft.write_text(json.dumps(value, indent=1, default=str) + "\n")
    draft.rename(path)
