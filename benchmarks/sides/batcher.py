"""Collects calls into batches as Ray Serve's `@serve.batch` does, for machines without Ray: a batch waits `wait_s` for
company after its first call and holds at most `max_size`; the next one forms while it runs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Batcher(Generic[Item, Result]):
    """One queue of calls on one event loop; a batch's error is raised in each of its calls."""

    def __init__(
        self, run: Callable[[list[Item]], Awaitable[Sequence[Result]]], *, max_size: int, wait_s: float
    ) -> None:
        self._run = run
        self._max_size = max_size
        self._wait_s = wait_s
        self._waiting: asyncio.Queue[tuple[Item, asyncio.Future[Result]]] = asyncio.Queue()
        self._worker: asyncio.Task[None] | None = None

    async def __call__(self, item: Item) -> Result:
        """Returns this item's result."""
        if self._worker is None:
            self._worker = asyncio.create_task(self._work())
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting.put_nowait((item, future))
        return await future

    def close(self) -> None:
        """Stop; calls that wait are never answered."""
        if self._worker is not None:
            self._worker.cancel()

    async def _work(self) -> None:
        while True:
            batch = [await self._waiting.get()]
            try:
                async with asyncio.timeout(self._wait_s):
                    while len(batch) < self._max_size:
                        batch.append(await self._waiting.get())
            except TimeoutError:
                pass
            try:
                results = await self._run([item for item, _ in batch])
            except Exception as error:  # noqa: BLE001 - belongs to the callers
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            for (_, future), result in zip(batch, results, strict=True):
                if not future.done():
                    future.set_result(result)
