"""Renew a runner's leases in a separate thread, so that the leases do not expire while the event loop is busy."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import NamedTuple

import structlog

from stable_audio_serve.core.errors import StorageError
from stable_audio_serve.jobs.job import Job, JobRef
from stable_audio_serve.jobs.store.job_store import JobStore

log = structlog.get_logger("stable_audio_serve.jobs")

_BEATS_PER_LEASE = 3
_CLOSE_TIMEOUT_S = 2.0


class LeaseId(NamedTuple):
    """Identifies one lease of one job. `fence` is the number of the job's leases so far (`Lease.fence`)."""

    ref: JobRef
    fence: int


def lease_id(job: Job) -> LeaseId:
    """Return the id of a job's lease. Raises ValueError if the job is not leased."""
    if job.lease is None:
        raise ValueError(f"job {job.spec.id} is not leased")
    return LeaseId(job.spec.ref, job.lease.fence)


class LeaseHeartbeat:
    """Renews all leases of one runner (`owner`) several times in `lease_s`, with one query each time."""

    def __init__(
        self,
        store: JobStore,
        owner: str,
        *,
        lease_s: float,
        held: Callable[[], Collection[LeaseId]],
        on_change: Callable[[Collection[LeaseId], Collection[LeaseId]], None],
    ) -> None:
        """`held` returns the runner's current leases. It is called in another thread.

        `on_change(lost, to_cancel)` is called if leases were lost, or if clients have cancelled running jobs. `lost`
        are the lost leases, `to_cancel` the leases of the cancelled jobs. `on_change` is called on the event loop on
        which `start` was called.
        """
        self._store = store
        self._owner = owner
        self._lease_s = lease_s
        self._held = held
        self._on_change = on_change
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="job-heartbeat", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Start the thread. Call this method on the event loop on which `on_change` should be called."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def beat(self) -> None:
        """Renew the leases now, and call `on_change` if necessary. Blocking. Raises StorageError."""
        held = self._held()
        if not held:
            return
        renewed = self._store.runners.renew(self._owner, lease_s=self._lease_s, refs={lease.ref for lease in held})
        alive = {LeaseId(job.ref, job.fence): job.cancel_requested for job in renewed}
        lost = [lease for lease in held if lease not in alive]
        to_cancel = [lease for lease in held if alive.get(lease)]
        if (lost or to_cancel) and self._loop is not None:
            with suppress(RuntimeError):  # the event loop was closed
                self._loop.call_soon_threadsafe(self._on_change, lost, to_cancel)

    def close(self) -> None:
        """Stop the thread. Waits at most `_CLOSE_TIMEOUT_S` for a renewal in progress. Blocking."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join(timeout=_CLOSE_TIMEOUT_S)

    def _run(self) -> None:
        while not self._closed.wait(self._lease_s / _BEATS_PER_LEASE):
            try:
                self.beat()
            except StorageError:
                log.warning("leases not renewed: the job database does not answer")
            except Exception:
                log.exception("leases not renewed")
