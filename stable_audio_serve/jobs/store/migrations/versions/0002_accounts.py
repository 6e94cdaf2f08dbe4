"""Revision 0002: a new table for the usage of clients with limits, with one row per client."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Create the table `accounts`."""
    op.create_table(
        "accounts",
        sa.Column("client", sa.Text, primary_key=True),
        sa.Column("state", sa.Text, nullable=False),
    )
