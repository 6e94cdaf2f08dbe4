"""Revision 0006: a new table for the adapters that operators load while a server runs."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    """Create the table `loaded_adapters`."""
    op.create_table(
        "loaded_adapters",
        sa.Column("server", sa.Text, primary_key=True),
        sa.Column("model", sa.Text, primary_key=True),
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("source", sa.Text, nullable=False),
    )
