"""The longest time that a test waits for an event that must happen, such as the end of a job.

Tests of the server's own time limits do not use it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TypeVar

# The longest waits of the tests take about 30 s on an idle machine, and 150 s on slow, shared cores. The limit is
# 300 s, so a test reaches the limit only if the event never happens. Pytest's own limit is longer.
PATIENCE_S = 300.0

_Found = TypeVar("_Found")


def wait_until(condition: Callable[[], _Found], *, every_s: float = 0.05) -> _Found:
    """Call the condition repeatedly until its result is true. Returns the result. Fails after PATIENCE_S."""
    deadline = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        assert time.monotonic() < deadline, f"still {found!r} after {PATIENCE_S:g} s"
        time.sleep(every_s)
    return found


async def until(condition: Callable[[], _Found], *, every_s: float = 0.005) -> _Found:
    """Like `wait_until`, but does not block the event loop."""
    async with asyncio.timeout(PATIENCE_S):
        while not (found := condition()):  # noqa: ASYNC110  there is no event to wait for
            await asyncio.sleep(every_s)
        return found
