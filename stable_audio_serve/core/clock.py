"""Clocks. Code that depends on time gets a clock as an argument, so that tests can control schedulers and deadlines."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """A source of the current time."""

    def monotonic(self) -> float:
        """Return the seconds since an arbitrary fixed point. The value never decreases."""
        ...

    def time(self) -> float:
        """Return Unix time in seconds. Do not measure durations with it: it jumps when the system's clock is set."""
        ...


class SystemClock:
    """The system's clock."""

    def monotonic(self) -> float:
        return time.monotonic()

    def time(self) -> float:
        return time.time()
