"""The bound on accepted work, in predicted seconds: what is above it is refused at once with an honest time to retry.
Thread-safe bookkeeping; knows no rows and no tensors.
"""

from __future__ import annotations

import threading

from stable_audio_serve.core.errors import OverloadedError

_LEAST_RETRY_S = 0.1


class Admission:
    """Predicted work by request id. A request is admitted while what is already there fits the bound."""

    def __init__(self, max_queue_s: float) -> None:
        self._max_ms = max_queue_s * 1000.0
        self._work_ms: dict[int, float] = {}
        self._lock = threading.Lock()

    @property
    def backlog_ms(self) -> float:
        """Predicted device time of everything accepted and unfinished, in milliseconds."""
        with self._lock:
            return sum(self._work_ms.values())

    def check(self) -> None:
        """Raises OverloadedError, with the time until there is room, when nothing would be admitted now."""
        backlog_ms = self.backlog_ms
        if backlog_ms > self._max_ms:
            raise self._refusal(backlog_ms)

    def admit(self, request_id: int, work_ms: float) -> None:
        """Count a request in. Raises OverloadedError as `check` does."""
        with self._lock:
            backlog_ms = sum(self._work_ms.values())
            if backlog_ms > self._max_ms:
                raise self._refusal(backlog_ms)
            self._work_ms[request_id] = work_ms

    def update(self, request_id: int, work_ms: float) -> None:
        """What is left of an admitted request."""
        with self._lock:
            if request_id in self._work_ms:
                self._work_ms[request_id] = work_ms

    def release(self, request_id: int) -> None:
        """The request ended; a second call does nothing."""
        with self._lock:
            self._work_ms.pop(request_id, None)

    def _refusal(self, backlog_ms: float) -> OverloadedError:
        retry_s = max((backlog_ms - self._max_ms) / 1000.0, _LEAST_RETRY_S)
        return OverloadedError(
            f"the queue is full: about {backlog_ms / 1000:.1f} s of work is waiting; retry in {retry_s:.1f} s",
            retry_after_s=retry_s,
        )
