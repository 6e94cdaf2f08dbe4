"""A bound on memory that many hold for a while; who finds no room waits in order of arrival."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class ByteBudget:
    """Bytes in use, of at most `limit`; more than that is given to one who is alone. Belongs to one event loop."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used = 0
        self._turn = asyncio.Lock()  # first come, first served: many small ones do not starve a large one
        self._released = asyncio.Condition()

    @asynccontextmanager
    async def hold(self, num_bytes: int) -> AsyncIterator[None]:
        """Have these bytes for the life of the context, once there is room for them."""
        async with self._turn, self._released:
            await self._released.wait_for(lambda: not self._used or self._used + num_bytes <= self._limit)
            self._used += num_bytes
        try:
            yield
        finally:
            self._used -= num_bytes
            async with self._released:
                self._released.notify_all()
