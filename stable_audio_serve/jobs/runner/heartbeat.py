"""Keeps a runner's leases alive from a thread of its own, so that a busy event loop loses none."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import NamedTuple

import structlog

from stable_audio_serve.core.errors import StorageError
from stable_audio_serve.jobs.job import Job, JobRef
from stable_audio_serve.jobs.store.store import JobStore

log = structlog.get_logger("stable_audio_serve.jobs")

_BEATS_PER_LEASE = 3
_CLOSE_TIMEOUT_S = 2.0


class LeaseId(NamedTuple):
    """One lease of one job."""

    ref: JobRef
    fence: int


def lease_id(job: Job) -> LeaseId:
    """Of a running job. Raises ValueError when it has no lease."""
    if job.lease is None:
        raise ValueError(f"job {job.spec.id} is not leased")
    return LeaseId(job.spec.ref, job.lease.fence)


class Heartbeat:
    """Renews everything that `owner` is told to hold, in one query, as long as there is anything."""

    def __init__(
        self,
        store: JobStore,
        owner: str,
        *,
        lease_s: float,
        tell: Callable[[Collection[LeaseId], Collection[LeaseId]], None],
    ) -> None:
        """`tell(lost, to_stop)` is called on the event loop of `start`: leases that are gone, jobs to be cancelled."""
        self._store = store
        self._owner = owner
        self._lease_s = lease_s
        self._tell = tell
        self._held: set[LeaseId] = set()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="job-heartbeat", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Begin to beat; call it on the event loop that is to be told."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def hold(self, lease: LeaseId) -> None:
        """Keep this one alive too."""
        with self._lock:
            self._held.add(lease)

    def release(self, lease: LeaseId) -> None:
        """It is over."""
        with self._lock:
            self._held.discard(lease)

    @property
    def is_alive(self) -> bool:
        """Whether it beats."""
        return self._thread.is_alive()

    def beat(self) -> None:
        """Renew now, and tell what became of the leases. Blocking. Raises StorageError."""
        with self._lock:
            held = frozenset(self._held)
        if not held:
            return
        renewed = self._store.renew(self._owner, lease_s=self._lease_s, refs={lease.ref for lease in held})
        alive = {LeaseId(job.ref, job.fence): job.cancel_requested for job in renewed}
        lost = [lease for lease in held if lease not in alive]
        to_stop = [lease for lease in held if alive.get(lease)]
        if (lost or to_stop) and self._loop is not None:
            with suppress(RuntimeError):  # the event loop was closed
                self._loop.call_soon_threadsafe(self._tell, lost, to_stop)

    def close(self) -> None:
        """Stop beating; a beat in progress is given a moment. Blocking."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join(timeout=_CLOSE_TIMEOUT_S)

    def _run(self) -> None:
        while not self._closed.wait(self._lease_s / _BEATS_PER_LEASE):
            try:
                self.beat()
            except StorageError:
                log.warning("leases were not renewed: the store does not answer")
            except Exception:
                log.exception("leases were not renewed")
