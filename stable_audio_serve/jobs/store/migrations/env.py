"""The script that Alembic runs to upgrade the tables, in the transaction that `upgrade` opened."""

from alembic import context

context.configure(connection=context.config.attributes["connection"])
context.run_migrations()
