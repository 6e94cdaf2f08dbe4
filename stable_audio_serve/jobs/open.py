"""Opens the stores and the job queue that the settings describe. No other module chooses between implementations."""

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
    """The identity of the job database, and a one-line description of where jobs and files are stored."""

    identity: str
    description: str


def check_stores(settings: Settings) -> None:
    """Raise ConfigError if the stores of these settings cannot be opened. Makes no connection and creates nothing."""
    open_store(settings)
    open_artifacts(settings)


def uses_sqlite(settings: Settings) -> bool:
    """Return True if jobs are in a SQLite file, which only one machine can use. Raises ConfigError."""
    return open_store(settings).database.is_sqlite


def open_store(settings: Settings, *, identity: str | None = None, catalog: ModelCatalog | None = None) -> JobStore:
    """Return the job store of these settings, not yet connected. Raises ConfigError.

    With an `identity` (`PreparedStores.identity`), the store refuses any other database and creates none.
    """
    url = database_url(settings.jobs.database_url, Path(settings.output_dir).absolute())
    return JobStore(Database(url, identity=identity), settings.jobs, storage=settings.storage, catalog=catalog)


def open_artifacts(settings: Settings, *, is_prepared: bool = False, metrics: Metrics | None = None) -> ArtifactStore:
    """Return the artifact store of these settings, not yet connected.

    With `is_prepared` the store does not create a missing folder.
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
        store.database.check_writable()
        identity = store.identity()
        artifacts.claim(identity)  # claim now: the sweeper spares files older than the claim
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
    """Return the job queue of these settings, not yet connected; see `open_store`. Raises ConfigError."""
    artifacts = open_artifacts(settings, is_prepared=identity is not None, metrics=metrics)
    return JobQueue(open_store(settings, identity=identity, catalog=catalog), artifacts, wake=wake)
