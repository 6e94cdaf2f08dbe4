"""The server of a chaos run, with two replicas of each deployment, and its database and object store."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from stable_audio_serve.artifacts.keys import OWNER_KEY, QUALITY_FOLDER
from tests.chaos.verdict import JobRow
from tests.databases import PostgresServer
from tests.object_storage import Faults, ObjectStorage, running_object_storage
from tests.serving.conftest import TINY
from tests.serving.launched import LaunchedServer, write_config

# A file without a job is deleted at this age. A job first stores its file and then lists the file in the database,
# which takes less time.
ORPHAN_AFTER_S = 30.0

_MODEL = {
    "name": "tiny",
    "path": TINY,
    "mode": "strict",
    "engine": {"warmup_budget_s": 0.2},
    "max_queue_s": 1e6,
    "replicas": {"min_replicas": 2, "max_replicas": 2},
}
_JOBS = {
    "runners": 2,
    "lease_s": 2.5,
    "max_attempts": 50,  # each kill may cost a job an attempt; the verdict checks the number of attempts
    "max_running": 8,
    "orphan_after_s": ORPHAN_AFTER_S,
    "webhook_allow_hosts": ["127.0.0.1"],
}
_PREFIX = "chaos"
WEBHOOK_SECRET = "whsec_" + base64.b64encode(bytes(range(32))).decode()
_FAULTS = Faults(errors=0.05, cuts=0.02)


@dataclass(frozen=True)
class Scene:
    """A running server that accepts requests, its job database and its bucket."""

    server: LaunchedServer
    postgres: PostgresServer
    database_url: str
    storage: ObjectStorage
    bucket: str

    def crash_database(self) -> None:
        self.postgres.restart("immediate")

    def rows(self) -> list[JobRow]:
        """Read every job directly from the database."""
        return [_to_row(row) for row in self._select("jobs")]

    def visible(self) -> list[str]:
        """Return the keys of all files that the database lists."""
        return [row["key"] for row in self._select("files")]

    def stored(self) -> set[str]:
        """Return the keys of all job files in the bucket, even if the database does not list them."""
        keys = {key.removeprefix(f"{_PREFIX}/") for key in self.storage.keys(self.bucket)}
        return {key for key in keys if key != OWNER_KEY and not key.startswith(f"{QUALITY_FOLDER}/")}

    def _select(self, table: str) -> list[Mapping[str, Any]]:
        engine = sa.create_engine(self.database_url.replace("postgresql:", "postgresql+psycopg:"))
        try:
            with engine.connect() as connection:
                return [dict(row) for row in connection.execute(sa.text(f"SELECT * FROM {table}")).mappings()]
        finally:
            engine.dispose()


@contextmanager
def running_scene(folder: Path, postgres: PostgresServer) -> Iterator[Scene]:
    """Run the server, its database and its object store until the context ends."""
    config = write_config(folder, {"models": [_MODEL], "jobs": _JOBS, "ingress": {"replicas": 2}})
    database_url = postgres.create_database()
    with running_object_storage() as storage:
        bucket = storage.make_bucket()
        storage.proxy.faults = _FAULTS
        environment = {
            "STABLE_AUDIO_MAX_STEPS": "1000",
            "STABLE_AUDIO_MAX_DURATION": "20",
            "STABLE_AUDIO_DATABASE_URL": database_url,
            "STABLE_AUDIO_WEBHOOK_SECRET": WEBHOOK_SECRET,
            **storage.environ(bucket, STABLE_AUDIO_STORAGE_PREFIX=_PREFIX),
        }
        server = LaunchedServer(config, environment=environment)
        try:
            yield Scene(server.wait_until_ready(), postgres, database_url, storage, bucket)
        finally:
            if server.process.poll() is None:
                server.stop()
            postgres.drop_database(database_url)


def _to_row(row: Mapping[str, Any]) -> JobRow:
    return JobRow(
        contract=row["contract"],
        id=row["id"],
        state=row["state"],
        attempts=row["attempts"],
        created_at=row["created_at"],
        completed_at=row["completed_at"],
        key=row["idempotency_key"],
        artifact=row["result_key"],
    )
