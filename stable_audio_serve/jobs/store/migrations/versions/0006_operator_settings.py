"""What operators set while a server runs: a drained server, models that stay loaded."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    """Make the table."""
    op.create_table(
        "operator_settings",
        sa.Column("server", sa.Text, primary_key=True),
        sa.Column("setting", sa.Text, primary_key=True),
        sa.Column("model", sa.Text, primary_key=True),
    )
