"""What a runner knows of the work that waits in its store: asked now and then, rarely where the answer takes long."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from stable_audio_serve.core.clock import Clock
from stable_audio_serve.jobs.store.waiting import Waiting

PAUSE_S = 1.0  # between two questions; a runner that has nothing to do looks about that often anyway
_REST = 50.0  # times as long as the answer took, at least: a fiftieth of one core, whatever waits
OLD_S = 30.0  # after the next question was due


class WaitingBacklog:
    """The last answer. Belongs to one event loop."""

    def __init__(self, ask: Callable[[], Mapping[str, Waiting]], *, clock: Clock) -> None:
        """`ask` blocks and may raise; it is called on a thread."""
        self._ask = ask
        self._clock = clock
        self._found: Mapping[str, Waiting] = {}
        self._due_at = clock.monotonic()
        self._old_at = float("-inf")

    def current(self) -> Mapping[str, Waiting] | None:
        """Returns what waits by model, models without any left out; None while that is not known."""
        return self._found if self._clock.monotonic() <= self._old_at else None

    def none_waits(self) -> None:
        """Note that nothing waits at all, which the runner knows without asking."""
        self._keep({}, took_s=0.0)

    async def refresh(self) -> None:
        """Ask, unless that was done a moment ago."""
        started_at = self._clock.monotonic()
        if started_at < self._due_at:
            return
        found = await asyncio.to_thread(self._ask)
        self._keep(found, took_s=self._clock.monotonic() - started_at)

    def _keep(self, found: Mapping[str, Waiting], *, took_s: float) -> None:
        self._found = found
        self._due_at = self._clock.monotonic() + max(PAUSE_S, _REST * took_s)
        self._old_at = self._due_at + OLD_S
