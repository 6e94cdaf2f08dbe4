"""Finished measurements of one run as files, so that a run which was cut goes on where it stopped."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_ABOUT, _LOCK = "about.json", ".lock"


class OtherRunError(RuntimeError):
    """A folder holds what was measured otherwise, or somebody is measuring into it now."""


@contextmanager
def measuring_into(folder: Path) -> Iterator[None]:
    """Raises OtherRunError if another process is measuring into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK).open("w") as lock:  # the system lets go of it when the process ends, however it does
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OtherRunError(f"another run is measuring into {folder}: wait, or choose another --out") from error
        yield


class Pieces:
    """A folder of JSON files, one per measurement; `about` is what all of them have in common."""

    def __init__(self, folder: Path, about: Mapping[str, object]) -> None:
        """Raises OtherRunError if the folder holds pieces of a run with other options."""
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._about = json.loads(json.dumps(about))
        path = folder / _ABOUT
        if path.exists() and (other := _differing(json.loads(path.read_text()), self._about)):
            raise OtherRunError(
                f"{folder} holds a run with other options ({', '.join(other)}): remove it, or choose another --out"
            )

    async def take(self, name: str, *, measure: Callable[[], Awaitable[Any]]) -> Any:
        """Returns what the file of this name holds, else measures and writes it."""
        path = self.folder / f"{name}.json"
        if path.exists():
            return json.loads(path.read_text())
        value = await measure()
        (self.folder / _ABOUT).write_text(json.dumps(self._about, indent=2) + "\n")
        half = path.with_suffix(".part")
        half.write_text(json.dumps(value) + "\n")
        half.rename(path)
        return value

    def __contains__(self, name: str) -> bool:
        return (self.folder / f"{name}.json").exists()


def _differing(there: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Returns the names of what is not the same, those of nested values without their parents'."""
    names: list[str] = []
    for name in sorted({*there, *wanted}):
        left, right = there.get(name), wanted.get(name)
        if isinstance(left, dict) and isinstance(right, dict):
            names += _differing(left, right)
        elif left != right:
            names.append(name)
    return names
