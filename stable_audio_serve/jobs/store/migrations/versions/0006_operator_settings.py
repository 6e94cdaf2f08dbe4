"""Settings that operators change while a server runs: draining, and models to keep loaded."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    """Create the table."""
    op.create_table(
        "operator_settings",
        sa.Column("server", sa.Text, primary_key=True),
        sa.Column("setting", sa.Text, primary_key=True),
        sa.Column("model", sa.Text, primary_key=True),
    )
