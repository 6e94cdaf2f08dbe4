"""The tables of the job database, the same on SQLite and PostgreSQL. All times are Unix seconds.

Every change here also needs a revision in `migrations/versions`, which upgrades existing databases.

Most indexes of jobs are partial: for example, an index that is only used for queued jobs contains no other jobs.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Literal

import sqlalchemy as sa

from stable_audio_serve.core.pricing import WorkSize

METADATA = sa.MetaData()


class _Text(sa.TypeDecorator[str]):
    """The type of a text column. Characters that SQLite or PostgreSQL cannot store are replaced by U+FFFD.

    PostgreSQL cannot store U+0000, and UTF-8 cannot encode lone surrogates.
    """

    impl = sa.Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: sa.Dialect) -> str | None:
        """Return the value that SQLAlchemy sends to the database."""
        return None if value is None else storable(value)


def storable(text: str) -> str:
    """Return `text` with U+FFFD in place of characters that SQLite or PostgreSQL cannot store."""
    if text.isascii() and "\0" not in text:
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").replace("\0", "\ufffd")


# Maps each column that stores a part of a job's `core.pricing.WorkSize` to the field of that class.
WORK = {f"work_{field.name}": field.name for field in fields(WorkSize)}

_Number = sa.BigInteger().with_variant(sa.Integer(), "sqlite")  # SQLite's AUTOINCREMENT needs the type INTEGER

JOBS = sa.Table(
    "jobs",
    METADATA,
    sa.Column("seq", _Number, primary_key=True),  # counts the jobs in order of arrival
    sa.Column("contract", _Text, nullable=False),
    sa.Column("id", _Text, nullable=False),
    sa.Column("client", _Text, nullable=False),
    sa.Column("id_is_chosen", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("model", _Text, nullable=False),
    sa.Column("priority", _Text, nullable=False),
    sa.Column("state", _Text, nullable=False),
    sa.Column("spec", _Text, nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("started_at", sa.Double),
    sa.Column("completed_at", sa.Double),
    sa.Column("not_before", sa.Double, nullable=False),
    sa.Column("start_before", sa.Double),  # NULL unless the job is queued
    sa.Column("owner", _Text),  # the runner; NULL unless the job runs
    sa.Column("fence", sa.Integer, nullable=False, server_default="0"),
    sa.Column("lease_until", sa.Double),
    sa.Column("attempts", sa.Integer, nullable=False, server_default="0"),
    sa.Column("cancel_requested", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("is_dead_letter", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("stage", _Text, nullable=False, server_default="queued"),
    sa.Column("fraction", sa.Double, nullable=False, server_default="0"),
    sa.Column("eta_s", sa.Double),
    sa.Column("engine_position", sa.Integer),
    sa.Column("num_sections", sa.Integer, nullable=False, server_default="0"),  # finished sections of a long piece
    sa.Column("result", _Text),
    sa.Column("error", _Text),
    sa.Column("idempotency_key", _Text),
    sa.Column("fingerprint", _Text, nullable=False),
    sa.Column("upload_key", _Text),
    sa.Column("result_key", _Text),
    sa.Column("webhook_url", _Text),
    sa.Column("webhook_host", _Text),
    sa.Column("webhook_at", sa.Double),  # when to send the webhook next; NULL = there is nothing to send
    sa.Column("webhook_attempts", sa.Integer, nullable=False, server_default="0"),
    sa.Column("retries", sa.Integer, nullable=False, server_default="0"),  # how often operators retried the failed job
    *(sa.Column(name, sa.Double, nullable=False, server_default="0") for name in WORK),
    sa.UniqueConstraint("id", "contract", "client"),  # id first: operators search by id alone, with this index
    sqlite_autoincrement=True,
)
_jobs = JOBS.c

# The condition for dead letters. SQLite uses the partial index `jobs_dead` only for a condition of exactly this text.
IS_DEAD = _jobs.is_dead_letter == sa.true()

EVENTS = sa.Table(
    "events",
    METADATA,
    sa.Column("id", _Number, primary_key=True),
    sa.Column("job", _Number, sa.ForeignKey("jobs.seq", ondelete="CASCADE"), nullable=False),
    sa.Column("at", sa.Double, nullable=False),
    sa.Column("stage", _Text, nullable=False),
    sa.Column("fraction", sa.Double, nullable=False),
    sa.Column("eta_s", sa.Double),
    sa.Column("message", _Text),
    sa.Column("num_sections", sa.Integer, nullable=False, server_default="0"),
    sa.Index("events_of_job", "job", "id"),
    sqlite_autoincrement=True,
)

# The finished sections of long pieces. A section's number counts from 1.
SECTIONS = sa.Table(
    "job_sections",
    METADATA,
    sa.Column("job", _Number, sa.ForeignKey("jobs.seq", ondelete="CASCADE"), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("key", _Text, nullable=False),
    sa.Column("section", _Text, nullable=False),
    sa.Index("job_sections_by_key", "key"),
)

# The order in which the clients' last jobs started, by model and priority (see `turns`). The starts of all jobs of a
# priority are numbered. `served` is the number of the last start of a job of this client, model and priority. 0 = none.
TURNS = sa.Table(
    "turns",
    METADATA,
    sa.Column("seq", _Number, primary_key=True),  # counts the rows in order of arrival
    sa.Column("priority", _Text, nullable=False),
    sa.Column("model", _Text, nullable=False),
    sa.Column("client", _Text, nullable=False),
    sa.Column("served", sa.BigInteger, nullable=False, server_default="0"),
    sa.UniqueConstraint("priority", "model", "client"),
    sa.Index("turns_in_order", "priority", "served", "seq"),
)

# Files that anyone with the link can download: the audio of finished jobs, and files that clients of an HTTP API store.
FILES = sa.Table(
    "files",
    METADATA,
    sa.Column("id", _Text, primary_key=True),
    sa.Column("key", _Text, nullable=False),
    sa.Column("file", _Text, nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Index("files_by_key", "key"),
    sa.Index("files_by_age", "created_at"),
)

# Uploaded files that are still stored. The sum of their sizes is limited for each client.
UPLOADS = sa.Table(
    "uploads",
    METADATA,
    sa.Column("name", _Text, primary_key=True),
    sa.Column("client", _Text, nullable=False),
    sa.Column("num_bytes", sa.BigInteger, nullable=False),
    sa.Column("expires_at", sa.Double, nullable=False),
    sa.Index("uploads_of_client", "client"),
    sa.Index("uploads_by_age", "expires_at"),
)

# One row: the identity of this database, and a secret that the servers with this database share.
IDENTITY = sa.Table(
    "identity",
    METADATA,
    sa.Column("seq", _Number, primary_key=True),  # always 1
    sa.Column("id", _Text, nullable=False),  # not secret: also in the bucket or folder of the files
    sa.Column("secret", _Text, nullable=False),
)

# The runners that start no jobs at present, because the artifact store refuses their files.
REFUSALS = sa.Table(
    "refusals",
    METADATA,
    sa.Column("owner", _Text, primary_key=True),
    sa.Column("state", _Text, nullable=False),
    sa.Column("reason", _Text),
    sa.Column("until", sa.Double, nullable=False),  # when the row expires, unless the runner writes it again
)

# Settings that operators change while a server runs. Several servers may share the database.
OPERATOR_SETTINGS = sa.Table(
    "operator_settings",
    METADATA,
    sa.Column("server", _Text, primary_key=True),
    sa.Column("setting", _Text, primary_key=True),
    sa.Column("model", _Text, primary_key=True),  # "" for settings that concern the whole server
)

# Adapters that operators load while a server runs. `server` is the name of the application, without the Ray session, so
# that the adapters are kept over restarts.
LOADED_ADAPTERS = sa.Table(
    "loaded_adapters",
    METADATA,
    sa.Column("server", _Text, primary_key=True),
    sa.Column("model", _Text, primary_key=True),
    sa.Column("name", _Text, primary_key=True),
    sa.Column("source", _Text, nullable=False),
)

# Requests of clients with limits. A request's audio counts toward the limit per minute for a minute. The request
# counts toward the limit of concurrent requests until it ends.
KEY_USES = sa.Table(
    "key_uses",
    METADATA,
    sa.Column("id", _Text, primary_key=True),
    sa.Column("client", _Text, nullable=False),
    sa.Column("at", sa.Double, nullable=False),
    sa.Column("audio_s", sa.Double, nullable=False),
    sa.Column("place_until", sa.Double, nullable=False),  # until then, the request counts as running
    sa.Index("key_uses_of_client", "client"),
)


def in_state(state: Literal["queued", "running"]) -> sa.ColumnElement[bool]:
    """Return the SQL condition for jobs in this state.

    The state is a literal in the SQL text. With a bound parameter instead, partial indexes would not be used.
    """
    return _jobs.state == sa.literal_column(f"'{state}'")


# All waiting and all running jobs, for queries that read many of them. SQLite would look for them in `jobs_of_client`,
# which has all ended jobs. It uses another index if a condition has a column that this index lacks.
WAITING = sa.and_(in_state("queued"), _jobs.not_before >= 0)
RUNNING = sa.and_(in_state("running"), _jobs.lease_until >= 0)


def count(*conditions: sa.ColumnElement[bool]) -> sa.ScalarSelect[int]:
    """Return an SQL subquery for the number of jobs that meet all conditions."""
    return sa.select(sa.func.count()).select_from(JOBS).where(*conditions).scalar_subquery()


def _index(name: str, *columns: sa.Column[Any], of: sa.ColumnElement[bool], unique: bool = False) -> None:
    sa.Index(name, *columns, unique=unique, sqlite_where=of, postgresql_where=of)


_QUEUED, _RUNNING = in_state("queued"), in_state("running")
_index("jobs_in_line", _jobs.priority, _jobs.model, _jobs.client, _jobs.seq, of=_QUEUED)
_index("jobs_waiting_of_client", _jobs.client, of=_QUEUED)
_index("jobs_waiting_work", _jobs.model, *(_jobs[name] for name in WORK), of=_QUEUED)
_index("jobs_by_delay", _jobs.not_before, of=_QUEUED)
_index("jobs_by_lateness", _jobs.start_before, of=_jobs.start_before.is_not(None))
_index("jobs_by_lease", _jobs.lease_until, of=_RUNNING)
_index("jobs_by_owner", _jobs.owner, of=_RUNNING)
_index("jobs_by_end", _jobs.completed_at, of=_jobs.completed_at.is_not(None))
_index("jobs_by_webhook", _jobs.webhook_at, of=_jobs.webhook_at.is_not(None))
_index("jobs_dead", _jobs.seq, of=IS_DEAD)
_index("jobs_by_upload", _jobs.upload_key, of=_jobs.upload_key.is_not(None))
_index("jobs_by_result", _jobs.result_key, of=_jobs.result_key.is_not(None))
_key = (_jobs.contract, _jobs.client, _jobs.idempotency_key)
_index("jobs_by_key", *_key, of=_jobs.idempotency_key.is_not(None), unique=True)
sa.Index("jobs_of_client", _jobs.client, _jobs.contract, _jobs.seq, _jobs.state)
