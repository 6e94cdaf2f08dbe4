"""How long a test waits for what must come: a server that starts, a job that ends, a process that says its last line.

What a test demands of the product never depends on it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TypeVar

# The longest of these waits take about half a minute on an idle machine; one with slow cores, shared with others, takes
# five times as long, and twice that is nobody's luck. Only what will never come is waited for to the end. Pytest's own
# limit for a test is several times this one.
PATIENCE_S = 300.0

_Found = TypeVar("_Found")


def wait_until(condition: Callable[[], _Found], *, every_s: float = 0.05) -> _Found:
    """The first true thing that the condition says."""
    deadline = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        assert time.monotonic() < deadline, f"still {found!r} after {PATIENCE_S:g} s"
        time.sleep(every_s)
    return found


async def until(condition: Callable[[], _Found], *, every_s: float = 0.005) -> _Found:
    """The same, while this event loop goes on with other things."""
    async with asyncio.timeout(PATIENCE_S):
        while not (found := condition()):  # noqa: ASYNC110  what is waited for is not ours to signal
            await asyncio.sleep(every_s)
        return found
