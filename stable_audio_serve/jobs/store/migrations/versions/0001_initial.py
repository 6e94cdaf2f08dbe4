"""The tables as they are until version 1.0."""

from alembic import op

from stable_audio_serve.jobs.store.tables import METADATA

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Make all tables."""
    METADATA.create_all(op.get_bind())
