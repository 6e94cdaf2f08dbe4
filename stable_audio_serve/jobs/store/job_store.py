"""The job store: all operations on one job database (SQLite or PostgreSQL), grouped by caller.

The operations block, so call them from worker threads. They raise StorageError while the database is unavailable.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from stable_audio_serve.core.catalog import ModelCatalog
from stable_audio_serve.core.settings import JobSettings, StorageSettings
from stable_audio_serve.jobs.store.client_jobs import ClientJobs
from stable_audio_serve.jobs.store.database import Database
from stable_audio_serve.jobs.store.dead_letters import DeadLetters
from stable_audio_serve.jobs.store.files import PublishedFiles, Uploads
from stable_audio_serve.jobs.store.key_uses import KeyUses
from stable_audio_serve.jobs.store.operator_jobs import OperatorJobs
from stable_audio_serve.jobs.store.retention import Retention
from stable_audio_serve.jobs.store.runner_jobs import RunnerJobs
from stable_audio_serve.jobs.store.sections import Sections
from stable_audio_serve.jobs.store.tables import IDENTITY


class JobStore:
    """The operations on one job database.

    Each attribute has the operations for one caller or task: clients, runners, retention and so on.
    """

    def __init__(
        self,
        database: Database,
        limits: JobSettings | None = None,
        *,
        storage: StorageSettings | None = None,
        catalog: ModelCatalog | None = None,
    ) -> None:
        """The constructor does not connect. `catalog` has the models' defaults, to compute how much work a job is."""
        limits, storage = limits or JobSettings(), storage or StorageSettings()
        self.database = database
        self.clients = ClientJobs(database, limits, catalog=catalog)
        self.runners = RunnerJobs(database)
        self.operators = OperatorJobs(database)
        self.dead_letters = DeadLetters(database)
        self.retention = Retention(database)
        self.files = PublishedFiles(database)
        self.sections = Sections(database)
        self.key_uses = KeyUses(database)
        self.uploads = Uploads(database, max_bytes=storage.max_bytes_per_key, life_s=limits.retention_s)

    def identity(self) -> str:
        """Return the random identity of this database, which was chosen when its tables were created."""
        return self._find_own(IDENTITY.c.id)

    def secret(self) -> str:
        """Return the secret of this database: 256 random bits. All servers that use the database sign data with it.

        Clients must not see it.
        """
        return self._find_own(IDENTITY.c.secret)

    def _find_own(self, column: sa.Column[Any]) -> str:
        with self.database.reading() as connection:
            return str(connection.execute(sa.select(column)).scalar_one())
