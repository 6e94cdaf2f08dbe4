"""Open the job database, the artifact store and the job queue as the settings describe.

Only this module chooses between local files and an S3 bucket, and between SQLite and PostgreSQL.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from stable_audio_serve.artifacts.local import LocalArtifacts
from stable_audio_serve.artifacts.s3 import S3Artifacts
from stable_audio_serve.artifacts.store import ArtifactStore
from stable_audio_serve.core.catalog import ModelCatalog
from stable_audio_serve.core.metrics import Metrics
from stable_audio_serve.core.settings import Settings
from stable_audio_serve.jobs.queue import JobQueue
from stable_audio_serve.jobs.store.database import Database, database_url
from stable_audio_serve.jobs.store.job_store import JobStore


@dataclass(frozen=True, slots=True)
class PreparedStores:
    """The identity of the job database, and a sentence on where jobs and files are stored."""

    identity: str
    description: str


def check_stores(settings: Settings) -> None:
    """Raise ConfigError if the settings of the job database or of the artifact store are invalid.

    Makes no connection and creates nothing.
    """
    open_store(settings)
    open_artifacts(settings)


def open_store(settings: Settings, *, identity: str | None = None, catalog: ModelCatalog | None = None) -> JobStore:
    """Return the job store of these settings. It connects when it is first used. Raises ConfigError.

    If `identity` (`PreparedStores.identity`) is given, the store refuses to use a database with another identity, and
    creates no database.
    """
    url = database_url(settings.jobs.database_url, Path(settings.output_dir).absolute())
    return JobStore(Database(url, identity=identity), settings.jobs, storage=settings.storage, catalog=catalog)


def open_artifacts(settings: Settings, *, is_prepared: bool = False, metrics: Metrics | None = None) -> ArtifactStore:
    """Return the artifact store (for audio files) of these settings. It connects when it is first used.

    If `is_prepared` is true, a missing local folder is an error: the store does not create the folder.
    """
    if settings.storage.bucket is not None:
        return S3Artifacts(settings.storage, metrics=metrics)
    return LocalArtifacts(Path(settings.output_dir).absolute(), may_make=not is_prepared, metrics=metrics)


def prepare_stores(settings: Settings) -> PreparedStores:
    """Check the artifact store, and create or upgrade the job database. Raises ConfigError, StorageError."""
    artifacts = open_artifacts(settings)
    artifacts.check()
    store = open_store(settings)
    try:
        store.database.prepare()
        identity = store.identity()
        # Claim the artifact store early: the sweeper deletes only files that are newer than the claim.
        artifacts.claim(identity)
    finally:
        store.database.close()
    return PreparedStores(identity, f"jobs are kept in {store.database}, their files in {artifacts}")


def open_queue(
    settings: Settings,
    *,
    identity: str | None = None,
    catalog: ModelCatalog | None = None,
    wake: Callable[[], None] = lambda: None,
    metrics: Metrics | None = None,
) -> JobQueue:
    """Return the job queue of these settings. It connects when first used, see `open_store`. Raises ConfigError."""
    artifacts = open_artifacts(settings, is_prepared=identity is not None, metrics=metrics)
    return JobQueue(open_store(settings, identity=identity, catalog=catalog), artifacts, wake=wake)
