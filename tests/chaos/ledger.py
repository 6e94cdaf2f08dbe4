"""The client's own book: what the server promised, on the disk before anything is made of it, and what came of it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Entry = Mapping[str, Any]


class Ledger:
    """A file of JSON lines that is only ever appended to; every line is on the disk when `write` returns."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("a")

    def write(self, what: str, order: int, **facts: Any) -> None:
        """`what`: accepted, unanswered (may have been accepted), fetched, failed, wrong."""
        self._file.write(json.dumps({"at": time.time(), "what": what, "order": order, **facts}) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def entries(self) -> list[Entry]:
        """Everything written, from the file."""
        return [json.loads(line) for line in self.path.read_text().splitlines()]

    def close(self) -> None:
        self._file.close()
