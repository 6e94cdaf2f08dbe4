"""How long a test waits for an event that must happen: a server start, a job's end, a process's last line.

The product's own time bounds in tests never depend on it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TypeVar

# The longest of these waits take about 30 s on an idle machine, and five times as long on a machine with slow, shared
# cores; the limit is twice that. Only an event that never happens reaches it. Pytest's limit per test is several times
# higher.
PATIENCE_S = 300.0

_Found = TypeVar("_Found")


def wait_until(condition: Callable[[], _Found], *, every_s: float = 0.05) -> _Found:
    """Returns the condition's first true result."""
    deadline = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        assert time.monotonic() < deadline, f"still {found!r} after {PATIENCE_S:g} s"
        time.sleep(every_s)
    return found


async def until(condition: Callable[[], _Found], *, every_s: float = 0.005) -> _Found:
    """Like `wait_until`, without blocking the event loop."""
    async with asyncio.timeout(PATIENCE_S):
        while not (found := condition()):  # noqa: ASYNC110  there is no event to wait for
            await asyncio.sleep(every_s)
        return found
