"""Stores finished measurements as files, so that an interrupted run continues where it stopped."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any


class OtherRunError(RuntimeError):
    """A folder holds pieces of a run with other options."""


class OutOfTimeError(RuntimeError):
    """The time budget ended before the run did; finished pieces are kept."""


class Pieces:
    """A folder of JSON files, one per measurement. `about` describes the run that all of them belong to."""

    def __init__(self, folder: Path, about: Mapping[str, object], *, ends_at: float = float("inf")) -> None:
        """After `ends_at` on the monotonic clock no new measurement begins. Raises OtherRunError if the folder holds
        pieces of a run with other options."""
        self.folder = folder
        self.ends_at = ends_at
        folder.mkdir(parents=True, exist_ok=True)
        wanted, path = json.loads(json.dumps(about, default=str)), folder / "about.json"
        there = json.loads(path.read_text()) if path.exists() else wanted
        if other := sorted(name for name in {*there, *wanted} if there.get(name) != wanted.get(name)):
            raise OtherRunError(
                f"{folder} holds a run with other options ({', '.join(other)}): remove it, or choose another --out"
            )
        self.about = wanted

    async def take(self, name: str, measure: Callable[[], Awaitable[Any]]) -> Any:
        """Returns the content of the file of this name. If it is missing, measures and writes it first.

        Raises OutOfTimeError if the measurement cannot begin in time.
        """
        path = self.folder / f"{name}.json"
        if path.exists():
            return json.loads(path.read_text())
        started_at = time.monotonic()
        if started_at >= self.ends_at:
            raise OutOfTimeError(f"out of time before {name}: the same command goes on from here")
        value = json.loads(json.dumps(await measure()))
        (self.folder / "about.json").write_text(json.dumps(self.about, indent=2) + "\n")
        draft = path.with_suffix(".part")
        draft.write_text(json.dumps(value) + "\n")
        draft.rename(path)  # so that an interrupted run leaves no incomplete file
        print(f"{name}: measured in {time.monotonic() - started_at:.1f} s", file=sys.stderr, flush=True)
        return value
