"""A bound on memory that several tasks hold for a while; those that find no room wait in order of arrival."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class ByteBudget:
    """Bytes in use, at most `limit`, except that one task alone may hold more. Belongs to one event loop."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used = 0
        self._turn = asyncio.Lock()  # first come, first served: many small requests do not starve a large one
        self._released = asyncio.Condition()

    @asynccontextmanager
    async def hold(self, num_bytes: int) -> AsyncIterator[None]:
        """Hold `num_bytes` for the life of the context, which begins once there is room for them."""
        async with self._turn, self._released:
            await self._released.wait_for(lambda: not self._used or self._used + num_bytes <= self._limit)
            self._used += num_bytes
        try:
            yield
        finally:
            self._used -= num_bytes
            async with self._released:
                self._released.notify_all()
