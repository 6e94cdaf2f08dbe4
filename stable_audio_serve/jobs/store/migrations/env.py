"""Alembic's entry point: runs revisions on the connection from `upgrade`, in its transaction."""

from alembic import context

context.configure(connection=context.config.attributes["connection"])
context.run_migrations()
