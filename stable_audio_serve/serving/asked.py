"""An answer of other processes that is asked for only while somebody wants it, seldom, and once at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from stable_audio_serve.core.clock import Clock, SystemClock

T = TypeVar("T")

_EVERY_S = 1.0
_PATIENCE_S = 1.0  # after this an older answer is better than a late one
_OLD_S = 5.0  # after this it is none: what was drained an hour ago may be at work now


class Asked(Generic[T]):
    """The last answer to one question. Used on one event loop."""

    def __init__(self, ask: Callable[[], Awaitable[T]], *, first: T, clock: Clock = SystemClock()) -> None:
        """`ask` does not raise; `first` is the answer while there is none, or only an old one."""
        self._ask = ask
        self._clock = clock
        self._first = self._answer = first
        self._asked_at = float("-inf")
        self._asking: asyncio.Task[None] | None = None

    async def answer(self) -> T:
        """Returns an answer about a second old; a few seconds where a newer one is late."""
        if self._asking is None or self._asking.done():
            if self._age_s < _EVERY_S:
                return self._answer
            self._asking = asyncio.create_task(self._renew())
        await asyncio.wait({self._asking}, timeout=_PATIENCE_S)
        return self._answer if self._age_s < _OLD_S else self._first

    def forget(self) -> None:
        """Ask anew next time, because the answer is another one now; one that is on its way does not count."""
        self._asked_at = float("-inf")
        if self._asking is not None:
            self._asking.cancel()
            self._asking = None

    @property
    def _age_s(self) -> float:
        return self._clock.monotonic() - self._asked_at

    async def _renew(self) -> None:
        self._answer = await self._ask()
        self._asked_at = self._clock.monotonic()
