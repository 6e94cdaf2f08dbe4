"""Alembic's revisions of the job database."""
