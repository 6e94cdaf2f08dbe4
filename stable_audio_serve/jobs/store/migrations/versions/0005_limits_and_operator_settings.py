"""Revision 0005: new tables for the usage of clients with limits, and for operators' settings.

The table `key_uses` has one row per request. The table `accounts`, which it replaces, had one row per client. Operators
change their settings while a server runs: draining, and the models to keep loaded.
"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Create the tables `key_uses` and `operator_settings`, and drop the table `accounts`.

    Servers of the previous revision that still run no longer find `accounts`. They apply the limits only to their own
    requests.
    """
    op.create_table(
        "key_uses",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("client", sa.Text, nullable=False),
        sa.Column("at", sa.Double, nullable=False),
        sa.Column("audio_s", sa.Double, nullable=False),
        sa.Column("place_until", sa.Double, nullable=False),
    )
    op.create_index("key_uses_of_client", "key_uses", ["client"])
    op.drop_table("accounts")
    op.create_table(
        "operator_settings",
        sa.Column("server", sa.Text, primary_key=True),
        sa.Column("setting", sa.Text, primary_key=True),
        sa.Column("model", sa.Text, primary_key=True),
    )
