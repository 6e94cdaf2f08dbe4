"""The bound on accepted work, in predicted seconds: work above it is refused at once, with a predicted time to retry.
Interactive work is compared with other interactive work only, so that batch work never causes its refusal; batch work
is compared with all work. Thread-safe bookkeeping; knows no rows and no tensors.
"""

from __future__ import annotations

import threading

from stable_audio_serve.core.errors import OverloadedError
from stable_audio_serve.core.generation import Priority

_LEAST_RETRY_S = 0.1


class Admission:
    """Predicted work by request id. A request is admitted while the work ahead of it is within the bound."""

    def __init__(self, max_queue_s: float, *, batch_share: float = 0.0) -> None:
        """`batch_share`: time given to batch work while interactive work runs, as a share of interactive time."""
        self._max_ms = max_queue_s * 1000.0
        self._batch_share = batch_share
        self._work_ms: dict[Priority, dict[int, float]] = {"interactive": {}, "batch": {}}
        self._lock = threading.RLock()

    @property
    def backlog_ms(self) -> float:
        """Predicted device time of everything accepted and unfinished, in milliseconds."""
        with self._lock:
            return sum(map(self._sum_ms, self._work_ms))

    def check(self, priority: Priority = "interactive") -> None:
        """Raises OverloadedError with the time until there is room if a request would be refused now."""
        with self._lock:
            ahead_ms = self._sum_ms("interactive")
            is_shared = priority == "interactive" and bool(self._work_ms["batch"])
            if priority == "batch":
                ahead_ms += self._sum_ms("batch")
        if ahead_ms > self._max_ms:
            raise self._refusal(ahead_ms, pace=1.0 + self._batch_share if is_shared else 1.0)

    def admit(self, request_id: int, work_ms: float, *, priority: Priority = "interactive") -> None:
        """Add a request's work. Raises OverloadedError as `check` does."""
        with self._lock:
            self.check(priority)
            self._work_ms[priority][request_id] = work_ms

    def update(self, request_id: int, work_ms: float) -> None:
        """Replace an admitted request's work by what is left of it."""
        with self._lock:
            for works in self._work_ms.values():
                if request_id in works:
                    works[request_id] = work_ms

    def release(self, request_id: int) -> None:
        """Remove an ended request. A second call does nothing."""
        with self._lock:
            for works in self._work_ms.values():
                works.pop(request_id, None)

    def _sum_ms(self, priority: Priority) -> float:
        return sum(self._work_ms[priority].values())

    def _refusal(self, ahead_ms: float, *, pace: float) -> OverloadedError:
        """`pace` is the time in which one second of this work is done."""
        retry_s = max(pace * (ahead_ms - self._max_ms) / 1000.0, _LEAST_RETRY_S)
        return OverloadedError(
            f"the model's queue is full (max_queue_s): about {ahead_ms / 1000:.1f} s of work is waiting; "
            f"retry in {retry_s:.1f} s",
            retry_after_s=retry_s,
        )
