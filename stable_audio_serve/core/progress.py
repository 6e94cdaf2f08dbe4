"""Limit how often progress is reported to slow receivers, such as another process or a database."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import suppress

from stable_audio_serve.core.clock import Clock, SystemClock
from stable_audio_serve.core.generation import Progress


class ProgressFeed:
    """An async iterator over the progress reports that are added with `put`. It leaves out some of them.

    Yields the first report of each stage immediately, and after that the latest report every `interval_s` seconds. Use
    a feed on one event loop only.
    """

    def __init__(self, interval_s: float, *, clock: Clock = SystemClock()) -> None:
        self._interval_s = interval_s
        self._clock = clock
        self._pending: deque[Progress] = deque()  # the reports to yield; of each stage only the latest report
        self._changed = asyncio.Event()
        self._is_closed = False

    def put(self, report: Progress) -> None:
        """Add the newest report."""
        if self._pending and self._pending[-1].stage == report.stage:
            self._pending[-1] = report
        else:
            self._pending.append(report)
            self._changed.set()

    def close(self) -> None:
        """End the feed. Iteration yields the pending reports and then stops."""
        self._is_closed = True
        self._changed.set()

    async def __aiter__(self) -> AsyncIterator[Progress]:
        stage, due_at = "", 0.0
        while self._pending or not self._is_closed:
            wait_s = self._wait_s(stage, due_at)
            if wait_s is not None and wait_s <= 0:
                report = self._pending.popleft()
                stage, due_at = report.stage, self._clock.monotonic() + self._interval_s
                yield report
                continue
            self._changed.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._changed.wait()

    def _wait_s(self, stage: str, due_at: float) -> float | None:
        """Return the seconds until the next report may be yielded, or None if no report is pending.

        `stage` is the stage of the last yielded report. The next report of this stage may be yielded at `due_at`.
        """
        if not self._pending:
            return None
        if self._is_closed or len(self._pending) > 1 or self._pending[0].stage != stage:
            return 0.0
        return due_at - self._clock.monotonic()
