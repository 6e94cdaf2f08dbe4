"""Let the server run on if its output cannot be written: the log's disk is full, or the terminal or pipe is closed."""

from __future__ import annotations

import io
import os
import sys
from typing import Any


class _LossyFile(io.FileIO):
    """A file that drops what cannot be written."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def tolerate_lost_output() -> None:
    """Replace `sys.stdout` and `sys.stderr` by streams whose writes never fail.

    A failed write would end the start or the drain, and the thread of Ray that prints log lines. Standard streams that
    the caller has closed are opened as /dev/null, because Ray does not start without standard error.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, f"__{name}__") is None:  # `open` returns the lowest free number, which is this stream's
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for number, name in ((1, "stdout"), (2, "stderr")):
        before = getattr(sys, name)
        if before is getattr(sys, f"__{name}__"):
            lossy = io.BufferedWriter(_LossyFile(number, "w", closefd=False))
            encoding, errors = getattr(before, "encoding", None), getattr(before, "errors", None)
            setattr(sys, name, io.TextIOWrapper(lossy, encoding=encoding, errors=errors, line_buffering=True))
