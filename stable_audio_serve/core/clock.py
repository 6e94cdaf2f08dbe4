"""Time as a dependency, so that schedulers and deadlines can be tested with a fake clock."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """The time that the rest of the code sees."""

    def monotonic(self) -> float:
        """Returns seconds since an arbitrary fixed point; never goes back."""
        ...

    def time(self) -> float:
        """Returns Unix time in seconds, for dates. It may be set at any time, so do not measure with it."""
        ...


class SystemClock:
    """The machine's own clock."""

    def monotonic(self) -> float:
        return time.monotonic()

    def time(self) -> float:
        return time.time()
