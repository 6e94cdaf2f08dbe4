"""Finished measurements of one run as files, so that a run which was cut goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

_ABOUT = "about.json"


class Pieces:
    """A folder of JSON files, one per measurement; `about` is what all of them have in common."""

    def __init__(self, folder: Path, about: Mapping[str, object]) -> None:
        """Raises RuntimeError if the folder holds pieces of a run with other options."""
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        wanted = json.loads(json.dumps(about))
        path = folder / _ABOUT
        if path.exists() and json.loads(path.read_text()) != wanted:
            raise RuntimeError(f"{folder} holds a run with other options: remove it, or choose another --out")
        path.write_text(json.dumps(wanted, indent=2) + "\n")

    async def take(self, name: str, *, measure: Callable[[], Awaitable[Any]]) -> Any:
        """Returns what the file of this name holds, else measures and writes it."""
        path = self.folder / f"{name}.json"
        if path.exists():
            return json.loads(path.read_text())
        value = await measure()
        half = path.with_suffix(".part")
        half.write_text(json.dumps(value) + "\n")
        half.rename(path)
        return value
