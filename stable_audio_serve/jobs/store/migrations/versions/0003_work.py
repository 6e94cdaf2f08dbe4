"""Revision 0003: columns for the predicted work of each job, and an index with these columns.

The query that sums the work of all queued jobs reads only the index, not the table.
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

_WORK = ("work_rows", "work_evaluations", "work_evaluated_s", "work_audio_s")


def upgrade() -> None:
    """Add the columns, and an index of queued jobs."""
    for name in _WORK:
        op.add_column("jobs", sa.Column(name, sa.Double, nullable=False, server_default="0"))
    queued = sa.text("state = 'queued'")
    op.create_index("jobs_waiting_work", "jobs", ["model", *_WORK], sqlite_where=queued, postgresql_where=queued)
