"""The outbox: webhooks to send for ended jobs (notices). They are stored with the jobs, so that they survive restarts.

Before a process delivers a notice, it claims the notice for a limited time. So two processes never deliver the same
notice at once. If a process dies, its notices are only delayed.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import sqlalchemy as sa

from stable_audio_serve.jobs.job import Job
from stable_audio_serve.jobs.store.database import Database
from stable_audio_serve.jobs.store.rows import is_job, to_job
from stable_audio_serve.jobs.store.tables import JOBS

# The longest pause between two attempts to deliver a notice. A notice that seems due later was postponed before the
# clock was set back.
LONGEST_PAUSE_S = 21_600.0

_jobs = JOBS.c


@dataclass(frozen=True, slots=True)
class Notice:
    """A webhook to deliver. `attempt` is 1 for the first attempt to deliver it.

    `retries` is how often operators have retried the job after it failed. `id` is the job's id, followed by `retries`
    if that is not 0: receivers may ignore an id that they know, but each end of the job is a new event.
    """

    id: str
    url: str
    host: str
    job: Job
    retries: int
    attempt: int


class Outbox:
    """The notices of one job database. The methods block, so call them from worker threads."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def claim(
        self,
        *,
        for_s: float,
        except_hosts: Collection[str] = (),
        except_clients: Collection[str] = (),
        except_pairs: Collection[tuple[str, str]] = (),
    ) -> Notice | None:
        """Claim the notice that has been due longest, and return it.

        Notices to `except_hosts`, of jobs of `except_clients`, and of the clients to the hosts in `except_pairs`, are
        left out.

        Other processes cannot claim the same notice for `for_s` seconds. Returns None if no notice is due.
        """
        now = self._database.now
        is_due = (
            _jobs.webhook_at <= now,
            _jobs.webhook_host.not_in(except_hosts),
            _jobs.client.not_in(except_clients),
            sa.tuple_(_jobs.client, _jobs.webhook_host).not_in(except_pairs),
        )
        first = sa.select(_jobs.seq).where(*is_due).order_by(_jobs.webhook_at).limit(1)
        change = sa.update(JOBS).where(_jobs.seq == first.with_for_update(skip_locked=True).scalar_subquery(), *is_due)
        values = change.values(webhook_at=now + for_s, webhook_attempts=_jobs.webhook_attempts + 1)
        # The first query may read many notices to hosts that are left out, so it does not hold the lock for writing.
        with self._database.reading() as connection:
            if connection.execute(first).first() is None:
                return None
        with self._database.writing() as connection:
            row = connection.execute(values.returning(JOBS)).first()
        if row is None:
            return None
        notice_id = f"{row.id}-{row.retries}" if row.retries else row.id
        return Notice(notice_id, row.webhook_url, row.webhook_host, to_job(row), row.retries, row.webhook_attempts)

    def remove(self, notice: Notice) -> None:
        """Remove a notice that was delivered, or that should not be delivered any more."""
        self._update(notice, webhook_at=None)

    def postpone(self, notice: Notice, *, delay_s: float) -> None:
        """Schedule the next delivery of a notice in `delay_s` seconds, at most `LONGEST_PAUSE_S`."""
        self._update(notice, webhook_at=self._database.now + min(delay_s, LONGEST_PAUSE_S))

    def _update(self, notice: Notice, *, webhook_at: sa.ColumnElement[float] | None) -> None:
        """Set the time of the next delivery of a notice. None removes the notice.

        Does nothing if another process has claimed the notice in the meantime, or if the job was retried.
        """
        is_same = (_jobs.retries == notice.retries, _jobs.webhook_attempts == notice.attempt)
        change = sa.update(JOBS).where(is_job(notice.job.spec.ref), *is_same)
        with self._database.writing() as connection:
            connection.execute(change.values(webhook_at=webhook_at))
