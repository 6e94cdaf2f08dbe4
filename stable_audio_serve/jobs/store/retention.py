"""Forgetting jobs and published files in the caller's transaction, and which files at rest nothing needs any more."""

from __future__ import annotations

import sqlalchemy as sa

from stable_audio_serve.jobs.store.tables import FILES, JOBS

_BATCH = 500  # parameters of one statement

_jobs = JOBS.c


def forget_some(connection: sa.Connection, *, before: sa.ColumnElement[float], limit: int) -> tuple[int, list[str]]:
    """How many jobs and published files were forgotten, and the keys that nothing refers to now."""
    old_jobs = sa.select(_jobs.seq).where(_jobs.completed_at <= before).order_by(_jobs.completed_at)
    old_files = sa.select(FILES.c.id).where(FILES.c.created_at <= before).order_by(FILES.c.created_at)
    # Locked first: an operator may be retrying one of them.
    jobs = connection.execute(old_jobs.limit(limit).with_for_update(skip_locked=True)).scalars().all()
    forget = sa.delete(JOBS).where(_jobs.seq.in_(jobs)).returning(_jobs.upload_key, _jobs.result_key)
    keys = [key for row in connection.execute(forget) for key in row if key is not None]
    connection.execute(sa.delete(FILES).where(FILES.c.key.in_(keys)))
    files = connection.execute(old_files.limit(limit).with_for_update(skip_locked=True)).scalars().all()
    forget_files = sa.delete(FILES).where(FILES.c.id.in_(files)).returning(FILES.c.key)
    keys += connection.execute(forget_files).scalars().all()
    return len(jobs) + len(files), unreferenced(connection, list(dict.fromkeys(keys)))


def unreferenced(connection: sa.Connection, keys: list[str]) -> list[str]:
    """Those of `keys` that no job and no published file needs."""
    known: set[str] = set()
    for start in range(0, len(keys), _BATCH):
        some = keys[start : start + _BATCH]
        for column, *conditions in (
            (_jobs.upload_key, sa.or_(_jobs.completed_at.is_(None), _jobs.is_dead_letter)),
            (_jobs.result_key,),
            (FILES.c.key,),
        ):
            known.update(connection.execute(sa.select(column).where(column.in_(some), *conditions)).scalars())
    return [key for key in keys if key not in known]
