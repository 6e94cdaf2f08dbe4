"""Revision 0007: a new table for finished sections of long pieces, and columns for their number."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    """Create the table `job_sections`, and add the column `num_sections` to `jobs` and `events`."""
    number = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    op.create_table(
        "job_sections",
        sa.Column("job", number, sa.ForeignKey("jobs.seq", ondelete="CASCADE"), primary_key=True),
        sa.Column("number", sa.Integer, primary_key=True),
        sa.Column("key", sa.Text, nullable=False),
        sa.Column("section", sa.Text, nullable=False),
    )
    op.create_index("job_sections_by_key", "job_sections", ["key"])
    for table in ("jobs", "events"):
        op.add_column(table, sa.Column("num_sections", sa.Integer, nullable=False, server_default="0"))
