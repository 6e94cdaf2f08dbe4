"""Handle stop signals in the launcher. The first signal starts an orderly stop. A later signal exits immediately."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

_NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Ctrl-C sends a signal to the whole process group. The programs `timeout` and `make` then send the signal to this
# process once more. Therefore a second signal within this time is ignored.
_DUPLICATE_S = 1.0


class StopSignals:
    """Handles SIGINT, SIGTERM and SIGHUP. The first signal raises KeyboardInterrupt. A later one exits this process."""

    def __init__(self) -> None:
        self._stopping_at: float | None = None
        self._late_exit_code = 0

    def listen(self) -> None:
        """Install the signal handlers, in place of any other handlers."""
        for number in _NUMBERS:
            signal.signal(number, self._handle)

    def begin_stop(self, *, exit_code: int) -> None:
        """From now on, exit this process with `exit_code` at the next signal. The guard then kills Ray's processes."""
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
