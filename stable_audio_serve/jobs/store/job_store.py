"""The job store: operations on one database, grouped by kind of user.

Every part is blocking (call it from worker threads) and raises StorageError while the database is unavailable. Runs on
SQLite and PostgreSQL.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from stable_audio_serve.core.catalog import ModelCatalog
from stable_audio_serve.core.settings import JobSettings, StorageSettings
from stable_audio_serve.jobs.store.client_jobs import ClientJobs
from stable_audio_serve.jobs.store.database import Database
from stable_audio_serve.jobs.store.dead_letters import DeadLetters
from stable_audio_serve.jobs.store.files import PublishedFiles
from stable_audio_serve.jobs.store.operator_jobs import OperatorJobs
from stable_audio_serve.jobs.store.retention import Retention
from stable_audio_serve.jobs.store.runner_jobs import RunnerJobs
from stable_audio_serve.jobs.store.tables import IDENTITY
from stable_audio_serve.jobs.store.uploads import Uploads
from stable_audio_serve.jobs.store.waiting import WaitingWork


class JobStore:
    """The operations of clients, runners, operators and the sweeper on jobs and published files."""

    def __init__(
        self,
        database: Database,
        limits: JobSettings | None = None,
        *,
        storage: StorageSettings | None = None,
        catalog: ModelCatalog | None = None,
    ) -> None:
        """Make no connection yet. `catalog` has the models' defaults, from which the work of a job is computed."""
        limits, storage = limits or JobSettings(), storage or StorageSettings()
        self.database = database
        self.clients = ClientJobs(database, limits, catalog=catalog)
        self.runners = RunnerJobs(database)
        self.operators = OperatorJobs(database)
        self.dead_letters = DeadLetters(database)
        self.retention = Retention(database)
        self.files = PublishedFiles(database)
        self.uploads = Uploads(database, max_bytes=storage.max_bytes_per_key, life_s=limits.retention_s)
        self.waiting = WaitingWork(database)

    def identity(self) -> str:
        """Return the random identity that this database was given at its first use."""
        return self._find_own(IDENTITY.c.id)

    def secret(self) -> str:
        """Return this database's secret: 256 random bits that its servers use as signing key. Keep it private."""
        return self._find_own(IDENTITY.c.secret)

    def _find_own(self, column: sa.Column[Any]) -> str:
        with self.database.reading() as connection:
            return str(connection.execute(sa.select(column)).scalar_one())
