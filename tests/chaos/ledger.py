"""The test client's record of its jobs and their results. Each entry is on disk before the client proceeds."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Entry = Mapping[str, Any]


class Ledger:
    """An append-only file of JSON lines. Each line is synced to disk before `write` returns."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("a")

    def write(self, what: str, order: int, **facts: Any) -> None:
        """Append an entry about the planned job number `order`.

        `what` is "accepted", "unanswered" (the server may have accepted the job), "fetched", "failed" or "wrong".
        """
        self._file.write(json.dumps({"at": time.time(), "what": what, "order": order, **facts}) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def entries(self) -> list[Entry]:
        """Read all entries from the file."""
        return [json.loads(line) for line in self.path.read_text().splitlines()]

    def close(self) -> None:
        self._file.close()
