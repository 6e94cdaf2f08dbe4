"""The finished sections of long pieces. Their audio is in files of the artifact store.

The methods block, so call them from worker threads. Every method raises StorageError.
"""

from __future__ import annotations

import sqlalchemy as sa

from stable_audio_serve.jobs.job import FinishedSection, Job, JobRef
from stable_audio_serve.jobs.store import codec
from stable_audio_serve.jobs.store.database import Database
from stable_audio_serve.jobs.store.rows import IS_JOB, is_held
from stable_audio_serve.jobs.store.tables import JOBS, SECTIONS
from stable_audio_serve.jobs.store.transitions import Transitions

_jobs = JOBS.c

# Built once, because building a statement takes longer than running it.
_FINISHED = (
    sa.select(SECTIONS.c.section)
    .join(JOBS, _jobs.seq == SECTIONS.c.job)
    .where(IS_JOB, SECTIONS.c.number > sa.bindparam("after"))
    .order_by(SECTIONS.c.number)
)


class Sections:
    """The finished sections in one job database."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._transitions = Transitions(database)

    def find(self, ref: JobRef, *, after: int = 0) -> list[FinishedSection]:
        """Return the finished sections of a job with numbers above `after`, in order."""
        with self._database.reading() as connection:
            found = connection.execute(_FINISHED, {**ref._asdict(), "after": after}).scalars()
            return [codec.load(FinishedSection, text) for text in found]

    def add(self, job: Job, section: FinishedSection, *, fraction: float) -> Job | None:
        """Add a finished section, and set the job's progress, in one transaction. The caller has stored the file.

        The current attempt counts as the first one again: a piece may fail as often at each section as a short job.

        Returns the changed job, or None if its lease is lost. If the call is repeated because the database's answer was
        lost, the section is not added twice.
        """
        seq = sa.select(_jobs.seq).where(is_held(job)).with_for_update()
        row = {"number": section.number, "key": section.file.key, "section": codec.dump(section)}
        message = f"section {section.number} of {len(job.spec.sections)} is finished"
        with self._database.writing() as connection:
            number = connection.execute(seq).scalar()
            if number is None:
                return None
            insert = self._database.insert(SECTIONS).values(row | {"job": number}).on_conflict_do_nothing()
            is_new = connection.execute(insert.returning(SECTIONS.c.number)).first() is not None
            progress = {"num_sections": section.number, "fraction": fraction, "attempts": 1}
            return self._transitions.change(
                connection, _jobs.seq == number, message=message if is_new else None, **progress
            )

    def remove(self, job: Job, *, first: int, fraction: float) -> None:
        """Remove the finished sections with numbers of at least `first`, and set the job's progress.

        The attempt counts even if it has made some of these sections. Otherwise, a storage that loses every file would
        let the job run forever. The sweeper deletes their files later. Does nothing if the job's lease is lost.
        """
        seq = sa.select(_jobs.seq).where(is_held(job)).with_for_update()
        with self._database.writing() as connection:
            number = connection.execute(seq).scalar()
            if number is not None:
                connection.execute(sa.delete(SECTIONS).where(SECTIONS.c.job == number, SECTIONS.c.number >= first))
                progress = {"num_sections": first - 1, "fraction": fraction, "attempts": job.attempts}
                self._transitions.change(connection, _jobs.seq == number, message=None, **progress)
