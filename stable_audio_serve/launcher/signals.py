"""Handle the launcher's signals: the first starts an orderly stop, a later one exits immediately."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

_NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# `timeout` and `make` forward a signal that the whole process group has already received. A second signal within this
# time is such a duplicate and is ignored.
_DUPLICATE_S = 1.0


class StopSignals:
    """Handles SIGINT, SIGTERM and SIGHUP."""

    def __init__(self) -> None:
        self._stopping_at: float | None = None
        self._late_exit_code = 0

    def listen(self) -> None:
        """Install the handlers, replacing the previous ones."""
        for number in _NUMBERS:
            signal.signal(number, self._handle)

    def begin_stop(self, *, exit_code: int) -> None:
        """Make a later signal exit this process with `exit_code`. The guard then kills its child processes."""
        self._late_exit_code = exit_code
        if self._stopping_at is None:
            self._stopping_at = time.monotonic()

    def _handle(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if self._stopping_at is None:
            self._stopping_at = now
            raise KeyboardInterrupt(signal.Signals(number).name)
        if now - self._stopping_at > _DUPLICATE_S:
            os._exit(self._late_exit_code)
