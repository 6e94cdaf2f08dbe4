"""A program that runs a job runner of this version, or of a simulated next version with additional tables.

It prints `ready`, or the reason why it cannot start. It runs until its standard input is closed. Then it prints how
many job attempts it has begun.
"""

from __future__ import annotations

import asyncio
import shutil
import sys
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from stable_audio_serve.jobs.store import tables
from stable_audio_serve.jobs.store.migrations import upgrade as migrations

NEXT = f"{int(migrations.newest_revision()) + 1:04d}"

_REVISION = f'''
import sqlalchemy as sa
from alembic import op

revision = "{NEXT}"
down_revision = "{migrations.newest_revision()}"

def upgrade():
    op.add_column("jobs", sa.Column("made_up_work_s", sa.Double, nullable=False, server_default="0"))
    op.add_column("jobs", sa.Column("made_up_note", sa.Text))
    op.create_index("made_up_by_work", "jobs", ["made_up_work_s"])
    op.create_table(
        "made_up",
        sa.Column("job", sa.BigInteger, sa.ForeignKey("jobs.seq", ondelete="CASCADE"), primary_key=True),
        sa.Column("runner", sa.Text, nullable=False),
    )
'''


def become_next(folder: Path) -> sa.Table:
    """Make this process act as the next version, which has a new table. Return the table.

    Must be called before the job store is imported.
    """
    shutil.copytree(Path(migrations.__file__).parent, folder)
    (folder / "versions" / f"{NEXT}_made_up.py").write_text(_REVISION)
    tables.JOBS.append_column(sa.Column("made_up_work_s", sa.Double, nullable=False, server_default="0"))
    tables.JOBS.append_column(sa.Column("made_up_note", sa.Text))
    from stable_audio_serve.jobs.store import database

    database.upgrade = partial(migrations.upgrade, folder=folder)  # type: ignore[assignment]
    database.require_known = partial(migrations.require_known, folder=folder)  # type: ignore[assignment]
    job = sa.Column("job", sa.ForeignKey(tables.JOBS.c.seq), primary_key=True)
    return sa.Table("made_up", tables.METADATA, job, sa.Column("runner", sa.Text, nullable=False))


async def work(url: str, outputs: str, made_up: sa.Table | None) -> None:
    from stable_audio_serve.core.errors import ConfigError
    from stable_audio_serve.core.settings import JobSettings, Settings
    from stable_audio_serve.jobs.open import open_queue
    from stable_audio_serve.jobs.runner.runner import JobRunner
    from tests.backends import ToneBackend
    from tests.jobs.conftest import SHORT_PAUSES

    settings = Settings(output_dir=outputs, jobs=JobSettings(database_url=url, max_running=2))
    queue = open_queue(settings)
    try:
        queue.store.database.prepare()
    except ConfigError as error:
        print_line(error.message)
        return
    if made_up is not None:
        queue.store.runners.lease = partial(_lease_and_note, queue.store, made_up)  # type: ignore[method-assign]
    backend = ToneBackend(delay_s=0.03)
    runner = JobRunner(queue.store, queue.artifacts, backend=backend, settings=settings, pauses=SHORT_PAUSES)
    await runner.start()
    print_line("ready")
    await asyncio.to_thread(sys.stdin.read)
    await runner.close()
    await queue.close()
    print_line(len(backend.requests))


def print_line(line: object) -> None:
    print(line, file=sys.__stdout__, flush=True)


def _lease_and_note(store: Any, made_up: sa.Table, owner: str, **options: Any) -> Any:
    """Lease a job, and write to the new table and the new columns of the next version."""
    jobs = tables.JOBS
    job = type(store.runners).lease(store.runners, owner, **options)
    if job is not None:
        with store.database.writing() as connection:
            is_it = (jobs.c.owner == owner, jobs.c.id == job.spec.id)
            change = sa.update(jobs).where(*is_it).values(made_up_work_s=2.5, made_up_note="leased")
            seq = connection.execute(change.returning(jobs.c.seq)).scalar_one()
            connection.execute(sa.insert(made_up).values(job=seq, runner=owner))
    return job


if __name__ == "__main__":
    _version, _url, _outputs = sys.argv[1:]
    with redirect_stdout(sys.stderr):  # the test reads standard output, so logs must not appear there
        _made_up = become_next(Path(_outputs) / "revisions") if _version == "next" else None
        asyncio.run(work(_url, _outputs, _made_up))
