"""Usage of clients with limits, one row per client."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Create the table."""
    op.create_table(
        "accounts",
        sa.Column("client", sa.Text, primary_key=True),
        sa.Column("state", sa.Text, nullable=False),
    )
