"""Handle stop signals in the launcher. The first signal starts an orderly stop. A later signal exits immediately."""

from __future__ import annotations

import os
import select
import signal
import time
from types import FrameType

_NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Ctrl-C sends a signal to the whole process group. The programs `timeout` and `make` then send the signal to this
# process once more. Therefore a second signal within this time is ignored.
_DUPLICATE_S = 1.0


class StopSignals:
    """Handles SIGINT, SIGTERM and SIGHUP. The first signal raises KeyboardInterrupt. A later one exits this process.

    An exception that a signal handler raises may be lost: Python only prints it if the signal arrives during a fork, as
    `ray.init` makes many. Therefore the signals are also written to a pipe, which `wait` reads.
    """

    def __init__(self) -> None:
        self._stopping_at: float | None = None
        self._late_exit_code = 0
        self._pipe, self._pipe_in = os.pipe()
        os.set_blocking(self._pipe_in, False)

    def listen(self) -> None:
        """Install the signal handlers, in place of any other handlers. Call this in the main thread."""
        for number in _NUMBERS:
            signal.signal(number, self._handle)
        # From now on, Python writes the number of each signal to the pipe, whichever handler is installed.
        signal.set_wakeup_fd(self._pipe_in, warn_on_full_buffer=False)

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait `timeout_s` seconds, or without a limit. Raises KeyboardInterrupt if a signal arrives or has arrived.

        Call this only while no stop has begun.
        """
        while select.select([self._pipe], [], [], timeout_s)[0]:
            if os.read(self._pipe, 1)[0] in _NUMBERS:
                self._stopping_at = self._stopping_at or time.monotonic()
                raise KeyboardInterrupt

    def begin_stop(self, *, exit_code: int) -> None:
        """From now on, exit this process with `exit_code` at the next signal. The guard then kills Ray's processes."""
        self._late_exit_code = exit_code
        self._stopping_at = self._stopping_at or time.monotonic()

    def _handle(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if self._stopping_at is None:
            self._stopping_at = now
            raise KeyboardInterrupt(signal.Signals(number).name)
        if now - self._stopping_at > _DUPLICATE_S:
            os._exit(self._late_exit_code)
