"""Revision 0001: the tables of the first release. Never edit this revision; to change tables, add a revision."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_NUMBER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_NO = sa.false()
_WORK = ("work_rows", "work_evaluations", "work_evaluated_s", "work_audio_s")


def upgrade() -> None:
    """Create all tables and their indexes."""
    _make_jobs()
    op.create_table(
        "events",
        sa.Column("id", _NUMBER, primary_key=True),
        sa.Column("job", _NUMBER, sa.ForeignKey("jobs.seq", ondelete="CASCADE"), nullable=False),
        sa.Column("at", sa.Double, nullable=False),
        _text("stage"),
        sa.Column("fraction", sa.Double, nullable=False),
        sa.Column("eta_s", sa.Double),
        sa.Column("message", sa.Text),
        sa.Column("num_sections", sa.Integer, nullable=False, server_default="0"),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "job_sections",
        sa.Column("job", _NUMBER, sa.ForeignKey("jobs.seq", ondelete="CASCADE"), primary_key=True),
        sa.Column("number", sa.Integer, primary_key=True),
        *(_text(name) for name in ("key", "section")),
    )
    op.create_table(
        "turns",
        sa.Column("seq", _NUMBER, primary_key=True),
        *(_text(name) for name in ("priority", "model", "client")),
        sa.Column("served", sa.BigInteger, nullable=False, server_default="0"),
        sa.UniqueConstraint("priority", "model", "client"),
    )
    op.create_table(
        "files",
        sa.Column("id", sa.Text, primary_key=True),
        *(_text(name) for name in ("key", "file")),
        sa.Column("created_at", sa.Double, nullable=False),
    )
    op.create_table(
        "uploads",
        sa.Column("name", sa.Text, primary_key=True),
        _text("client"),
        sa.Column("num_bytes", sa.BigInteger, nullable=False),
        sa.Column("expires_at", sa.Double, nullable=False),
    )
    op.create_table("identity", sa.Column("seq", _NUMBER, primary_key=True), _text("id"), _text("secret"))
    op.create_table(
        "refusals",
        sa.Column("owner", sa.Text, primary_key=True),
        _text("state"),
        sa.Column("reason", sa.Text),
        sa.Column("until", sa.Double, nullable=False),
    )
    op.create_table(
        "key_uses",
        sa.Column("id", sa.Text, primary_key=True),
        _text("client"),
        *(sa.Column(name, sa.Double, nullable=False) for name in ("at", "audio_s", "place_until")),
    )
    op.create_table(
        "operator_settings", *(sa.Column(name, sa.Text, primary_key=True) for name in ("server", "setting", "model"))
    )
    op.create_table(
        "loaded_adapters",
        *(sa.Column(name, sa.Text, primary_key=True) for name in ("server", "model", "name")),
        _text("source"),
    )
    op.create_index("events_of_job", "events", ["job", "id"])
    op.create_index("job_sections_by_key", "job_sections", ["key"])
    op.create_index("turns_in_order", "turns", ["priority", "served", "seq"])
    op.create_index("files_by_key", "files", ["key"])
    op.create_index("files_by_age", "files", ["created_at"])
    op.create_index("uploads_of_client", "uploads", ["client"])
    op.create_index("uploads_by_age", "uploads", ["expires_at"])
    op.create_index("key_uses_of_client", "key_uses", ["client"])
    _make_indexes_of_jobs()


def _make_jobs() -> None:
    op.create_table(
        "jobs",
        sa.Column("seq", _NUMBER, primary_key=True),
        *(_text(name) for name in ("contract", "id", "client")),
        sa.Column("id_is_chosen", sa.Boolean, nullable=False, server_default=_NO),
        *(_text(name) for name in ("model", "priority", "state", "spec")),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("started_at", sa.Double),
        sa.Column("completed_at", sa.Double),
        sa.Column("not_before", sa.Double, nullable=False),
        sa.Column("start_before", sa.Double),
        sa.Column("owner", sa.Text),
        sa.Column("fence", sa.Integer, nullable=False, server_default="0"),
        sa.Column("lease_until", sa.Double),
        sa.Column("attempts", sa.Integer, nullable=False, server_default="0"),
        sa.Column("cancel_requested", sa.Boolean, nullable=False, server_default=_NO),
        sa.Column("is_dead_letter", sa.Boolean, nullable=False, server_default=_NO),
        sa.Column("stage", sa.Text, nullable=False, server_default="queued"),
        sa.Column("fraction", sa.Double, nullable=False, server_default="0"),
        sa.Column("eta_s", sa.Double),
        sa.Column("engine_position", sa.Integer),
        sa.Column("num_sections", sa.Integer, nullable=False, server_default="0"),
        *(sa.Column(name, sa.Text) for name in ("result", "error", "idempotency_key")),
        _text("fingerprint"),
        *(sa.Column(name, sa.Text) for name in ("upload_key", "result_key", "webhook_url", "webhook_host")),
        sa.Column("webhook_at", sa.Double),
        sa.Column("webhook_attempts", sa.Integer, nullable=False, server_default="0"),
        sa.Column("retries", sa.Integer, nullable=False, server_default="0"),
        *(sa.Column(name, sa.Double, nullable=False, server_default="0") for name in _WORK),
        sa.UniqueConstraint("id", "contract", "client"),
        sqlite_autoincrement=True,
    )


def _make_indexes_of_jobs() -> None:
    queued, running = sa.text("state = 'queued'"), sa.text("state = 'running'")
    _index("jobs_in_line", "priority", "model", "client", "seq", of=queued)
    _index("jobs_waiting_of_client", "client", of=queued)
    _index("jobs_waiting_work", "model", *_WORK, of=queued)
    _index("jobs_by_delay", "not_before", of=queued)
    _index("jobs_by_lateness", "start_before", of=sa.text("start_before IS NOT NULL"))
    _index("jobs_by_lease", "lease_until", of=running)
    _index("jobs_by_owner", "owner", of=running)
    _index("jobs_by_end", "completed_at", of=sa.text("completed_at IS NOT NULL"))
    _index("jobs_by_webhook", "webhook_at", of=sa.text("webhook_at IS NOT NULL"))
    _index("jobs_dead", "seq", of=sa.column("is_dead_letter", sa.Boolean) == sa.true())
    _index("jobs_by_upload", "upload_key", of=sa.text("upload_key IS NOT NULL"))
    _index("jobs_by_result", "result_key", of=sa.text("result_key IS NOT NULL"))
    _index(
        "jobs_by_key", "contract", "client", "idempotency_key", of=sa.text("idempotency_key IS NOT NULL"), unique=True
    )
    op.create_index("jobs_of_client", "jobs", ["client", "contract", "seq", "state"])


def _text(name: str) -> sa.Column[Any]:
    return sa.Column(name, sa.Text, nullable=False)


def _index(name: str, *columns: str, of: sa.ColumnElement[bool] | sa.TextClause, unique: bool = False) -> None:
    op.create_index(name, "jobs", columns, unique=unique, sqlite_where=of, postgresql_where=of)
