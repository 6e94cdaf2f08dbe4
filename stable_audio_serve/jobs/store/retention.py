"""Database operations of the sweeper: delete old jobs and published files, and find files that no row refers to."""

from __future__ import annotations

from collections.abc import Collection

import sqlalchemy as sa

from stable_audio_serve.core.ids import ArtifactKey
from stable_audio_serve.jobs.store.database import Database
from stable_audio_serve.jobs.store.tables import FILES, JOBS, SECTIONS

_BATCH = 500  # most parameters of one SQL statement

_jobs = JOBS.c


class Retention:
    """Deletes old rows from the database. The caller deletes the files that the rows referred to."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def purge(self, *, age_s: float, limit: int = 100) -> list[ArtifactKey]:
        """Delete the rows of ended jobs and of published files that are older than `age_s` seconds, some at a time.

        Returns the keys of the files that no row refers to any more; the caller should delete these files. Each
        transaction deletes up to `limit` jobs and `limit` published files. An empty result means that nothing is left
        to delete.
        """
        while True:
            with self._database.writing() as connection:
                num_deleted, keys = _delete_some(connection, before=self._database.now - age_s, limit=limit)
            if keys or not num_deleted:
                return keys

    def unreferenced(self, keys: Collection[ArtifactKey]) -> list[ArtifactKey]:
        """Return the elements of `keys` to which no job and no published file refers."""
        with self._database.reading() as connection:
            return unreferenced(connection, list(keys))


def _delete_some(
    connection: sa.Connection, *, before: sa.ColumnElement[float], limit: int
) -> tuple[int, list[ArtifactKey]]:
    """Delete up to `limit` ended jobs and `limit` published files that are older than `before`.

    Returns the number of deleted jobs and files, and the keys to which no row refers any more.
    """
    old_jobs = sa.select(_jobs.seq).where(_jobs.completed_at <= before).order_by(_jobs.completed_at)
    old_files = sa.select(FILES.c.id).where(FILES.c.created_at <= before).order_by(FILES.c.created_at)
    # The rows are locked before they are deleted, and locked rows are skipped: an operator may just retry one of them.
    jobs = connection.execute(old_jobs.limit(limit).with_for_update(skip_locked=True)).scalars().all()
    sections = sa.select(SECTIONS.c.key).where(SECTIONS.c.job.in_(jobs))
    section_keys = connection.execute(sections).scalars().all()
    delete_jobs = sa.delete(JOBS).where(_jobs.seq.in_(jobs)).returning(_jobs.upload_key, _jobs.result_key)
    keys = [key for row in connection.execute(delete_jobs) for key in row if key is not None]
    connection.execute(sa.delete(FILES).where(FILES.c.key.in_(keys)))
    keys += section_keys
    files = connection.execute(old_files.limit(limit).with_for_update(skip_locked=True)).scalars().all()
    delete_files = sa.delete(FILES).where(FILES.c.id.in_(files)).returning(FILES.c.key)
    keys += connection.execute(delete_files).scalars().all()
    return len(jobs) + len(files), unreferenced(connection, list(dict.fromkeys(keys)))


def unreferenced(connection: sa.Connection, keys: list[ArtifactKey]) -> list[ArtifactKey]:
    """Return the elements of `keys` to which no job, no finished section and no published file refers.

    An ended job does not need its upload any more, except a dead letter, which an operator may retry.
    """
    referenced: set[ArtifactKey] = set()
    for start in range(0, len(keys), _BATCH):
        some = keys[start : start + _BATCH]
        for column, *conditions in (
            (_jobs.upload_key, sa.or_(_jobs.completed_at.is_(None), _jobs.is_dead_letter)),
            (_jobs.result_key,),
            (FILES.c.key,),
            (SECTIONS.c.key,),
        ):
            referenced.update(connection.execute(sa.select(column).where(column.in_(some), *conditions)).scalars())
    return [key for key in keys if key not in referenced]
