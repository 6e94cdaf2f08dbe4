"""What Alembic runs: revisions on the connection that `upgrade` hands over, in its transaction."""

from alembic import context

from stable_audio_serve.jobs.store.tables import METADATA

context.configure(connection=context.config.attributes["connection"], target_metadata=METADATA)
context.run_migrations()
