"""Time as a dependency, so that schedulers and deadlines can be tested with a fake clock."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """What the rest of the code may ask about time."""

    def monotonic(self) -> float:
        """Seconds since an arbitrary fixed point, never going back."""
        ...

    def time(self) -> float:
        """Unix time, seconds: for dates. It may be set while the process runs, so it measures no durations."""
        ...


class SystemClock:
    """The machine's own clock."""

    def monotonic(self) -> float:
        """Seconds since an arbitrary fixed point, never going back."""
        return time.monotonic()

    def time(self) -> float:
        """Unix time, seconds."""
        return time.time()
