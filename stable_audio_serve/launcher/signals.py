"""What signals do to the launcher: the first one begins an orderly stop, a later one ends it at once."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

_NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_ONE_WISH_S = 1.0  # `timeout` and `make` pass a signal on that the whole process group got as well


class StopSignals:
    """The process's handlers for SIGINT, SIGTERM and SIGHUP."""

    def __init__(self) -> None:
        self._stopping_at: float | None = None
        self._late_exit_code = 0

    def listen(self) -> None:
        """Install the handlers, in place of those before."""
        for number in _NUMBERS:
            signal.signal(number, self._handle)

    def begin_stop(self, *, exit_code: int) -> None:
        """From now on a signal ends this process at once, with `exit_code`: its guard kills what it leaves behind."""
        self._late_exit_code = exit_code
        if self._stopping_at is None:
            self._stopping_at = time.monotonic()

    def _handle(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if self._stopping_at is None:
            self._stopping_at = now
            raise KeyboardInterrupt(signal.Signals(number).name)
        if now - self._stopping_at > _ONE_WISH_S:
            os._exit(self._late_exit_code)
