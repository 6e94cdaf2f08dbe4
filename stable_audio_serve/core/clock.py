"""An injected clock, so that tests can control schedulers and deadlines."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Source of the current time."""

    def monotonic(self) -> float:
        """Returns seconds since an arbitrary fixed point; never decreases."""
        ...

    def time(self) -> float:
        """Returns Unix time in seconds. For dates only: the operator may adjust it, so do not measure durations."""
        ...


class SystemClock:
    """The system's clock."""

    def monotonic(self) -> float:
        return time.monotonic()

    def time(self) -> float:
        return time.time()
