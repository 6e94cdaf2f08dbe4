"""What is attacked: a server as an operator starts it, two replicas of everything; its database and files."""

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

# Longer than any file may have to wait for the commit that makes it visible.
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
    "max_attempts": 50,  # every kill may cost one; how many it really cost is judged afterwards
    "max_running": 8,
    "orphan_after_s": ORPHAN_AFTER_S,
    "sweep_every_s": 5.0,
    "webhook_allow_hosts": ["127.0.0.1"],
}
_PREFIX = "chaos"
WEBHOOK_SECRET = "whsec_" + base64.b64encode(bytes(range(32))).decode()
_FAULTS = Faults(errors=0.05, cuts=0.02)


@dataclass(frozen=True)
class Scene:
    """A ready server, the database that it keeps its jobs in, and the bucket that it keeps its files in."""

    server: LaunchedServer
    postgres: PostgresServer
    database_url: str
    storage: ObjectStorage
    bucket: str

    def crash_database(self) -> None:
        """End the database without any order, and start it again."""
        self.postgres.restart("immediate")

    def rows(self) -> list[JobRow]:
        """Every job, read past the code under test."""
        return [_to_row(row) for row in self._select("jobs")]

    def visible(self) -> list[str]:
        """Keys of all published files."""
        return [row["key"] for row in self._select("files")]

    def stored(self) -> set[str]:
        """Keys of all files of jobs there are, visible or not: neither the one that says whose they are, nor what is
        kept of models that passed their quality gate."""
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
    """Start the server, stop it afterwards."""
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
