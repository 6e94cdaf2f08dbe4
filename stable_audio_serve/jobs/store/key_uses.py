"""Count how much clients with limits use: seconds of audio per minute, and concurrent requests.

The job database has a row for each admitted request of such a client, so the limits hold for all servers that share the
database. The methods of `KeyUses` block, so call them from worker threads. Every one raises StorageError.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from stable_audio_serve.core.errors import QuotaError
from stable_audio_serve.core.ids import ClientId
from stable_audio_serve.core.keys import KeyLimits
from stable_audio_serve.jobs.store.database import Database
from stable_audio_serve.jobs.store.tables import KEY_USES

WINDOW_S = 60.0  # the audio of a request counts toward the limit per minute for this long
LEASE_S = 15.0  # a request stops counting toward `concurrency` after this time without `renew`: its process has died

_ROUNDING_S = 1e-6  # a sum of floats may exceed the limit by this much

_uses = KEY_USES.c

Used = tuple[float, float, int]  # one or more requests: time of the last, seconds of audio, number still running


@dataclass(slots=True, kw_only=True)
class Use:
    """A request of a client with limits.

    If `has_place` is true, the request counts toward the client's limit `concurrency` until it ends. If that limit is
    reached, the error tells the client to retry after `busy_retry_s` seconds.
    """

    id: str
    client: ClientId
    limits: KeyLimits
    audio_s: float
    has_place: bool
    busy_retry_s: float = 1.0


def find_full(use: Use, before: Sequence[Used], *, now: float) -> QuotaError | None:
    """Return the error to raise if the request `use` would exceed a limit, or None.

    `before` are the client's earlier requests, oldest first. `now` is the current time, by the clock that timed them.
    """
    concurrency, rate = use.limits.concurrency, use.limits.audio_seconds_per_minute
    if use.has_place and concurrency is not None and sum(places for _, _, places in before) >= concurrency:
        message = f"this key already runs as many requests as it may (concurrency={concurrency})"
        return QuotaError(message, retry_after_s=use.busy_retry_s)
    if rate is None:
        return None
    counting = [(at, audio_s) for at, audio_s, _ in before if at + WINDOW_S > now]
    over_s = sum(audio_s for _, audio_s in counting) + use.audio_s - rate
    ready_in_s = 0.0
    for at, audio_s in counting:
        if over_s <= _ROUNDING_S:
            break
        over_s -= audio_s
        ready_in_s = at + WINDOW_S - now
    if not ready_in_s:
        return None
    message = f"this key has used up its seconds of audio for this minute (audio-seconds-per-minute={rate:g})"
    return QuotaError(message, retry_after_s=ready_in_s)


class KeyUses:
    """Counts requests in one database. Concurrent requests never exceed a limit together, even in several processes."""

    def __init__(self, database: Database) -> None:
        self._database = database
        now = database.now
        # Rows with times too far in the future do not count: they were written before the clock was set back.
        has_audio = sa.and_(_uses.at > now - WINDOW_S, _uses.at < now + WINDOW_S)
        has_place = sa.and_(_uses.place_until > now, _uses.place_until < now + 2 * LEASE_S)
        is_of_client = _uses.client == sa.bindparam("of_client")
        last_at = sa.func.max(_uses.at)
        audio_s = sa.func.coalesce(sa.func.sum(_uses.audio_s).filter(has_audio), 0.0)
        self._find = (
            sa.select(now.label("now"), last_at, audio_s, sa.func.count().filter(has_place))
            .where(is_of_client)
            # One result row per second, so that the result is small even if a client sends many requests.
            .group_by(sa.cast(_uses.at, sa.BigInteger))
            .order_by(last_at)
        )
        self._forget = sa.delete(KEY_USES).where(is_of_client, sa.not_(has_audio), sa.not_(has_place))
        place_s = sa.bindparam("place_s", type_=sa.Double)
        self._insert = sa.insert(KEY_USES).values(at=now, place_until=now + place_s)
        is_any = _uses.id.in_(sa.bindparam("ids", expanding=True))
        self._renew = sa.update(KEY_USES).where(is_any).values(place_until=now + LEASE_S)

    def admit(self, use: Use) -> QuotaError | None:
        """Count a request, and return None. If it would exceed a limit, return the error and do not count it.

        If the call is repeated because the database's answer was lost, the request is not counted twice.
        """
        lock = zlib.crc32(f"uses of {use.client}".encode())
        with self._database.writing_alone(lock, is_durable=False) as connection:
            if connection.execute(sa.select(_uses.id).where(_uses.id == use.id)).first() is not None:
                return None
            before, now = self._find_used(connection, use)
            refusal = find_full(use, before, now=now)
            if refusal is None:
                if any(not (audio_s or places) for _, audio_s, places in before):
                    connection.execute(self._forget, {"of_client": use.client})
                row = {"id": use.id, "client": use.client, "audio_s": use.audio_s}
                connection.execute(self._insert, row | {"place_s": LEASE_S if use.has_place else 0.0})
        return refusal

    def find_full(self, use: Use) -> QuotaError | None:
        """Return the error that `admit` would return for the request, or None, but do not count the request."""
        with self._database.reading() as connection:
            before, now = self._find_used(connection, use)
        return find_full(use, before, now=now)

    def audio_s(self, use: Use) -> float:
        """Return how many seconds of the client's audio count toward its limit per minute now."""
        with self._database.reading() as connection:
            before, now = self._find_used(connection, use)
        return sum(audio_s for at, audio_s, _ in before if at + WINDOW_S > now)

    def end(self, use: Use, *, counts: bool) -> None:
        """Stop counting a request toward `concurrency`. If `counts` is false, its audio no longer counts either."""
        is_it = _uses.id == use.id
        is_kept = counts and use.limits.audio_seconds_per_minute is not None
        with self._database.writing(is_durable=False) as connection:
            free = sa.update(KEY_USES).where(is_it).values(place_until=0.0)
            connection.execute(free if is_kept else sa.delete(KEY_USES).where(is_it))

    def renew(self, ids: Sequence[str]) -> None:
        """Count the running requests with these ids toward `concurrency` for `LEASE_S` seconds from now."""
        with self._database.writing(is_durable=False) as connection:
            connection.execute(self._renew, {"ids": ids})

    def _find_used(self, connection: sa.Connection, use: Use) -> tuple[list[Used], float]:
        """Return the client's requests, grouped by second, oldest first, and the current time of the database."""
        rows = connection.execute(self._find, {"of_client": use.client}).all()
        return [(at, audio_s, places) for _, at, audio_s, places in rows], rows[0].now if rows else 0.0
