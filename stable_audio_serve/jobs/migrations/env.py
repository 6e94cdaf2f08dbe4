"""What Alembic runs: revisions on the connection that `jobs.database` hands over, in its transaction."""

from alembic import context

from stable_audio_serve.jobs.database import METADATA

context.configure(connection=context.config.attributes["connection"], target_metadata=METADATA)
context.run_migrations()
