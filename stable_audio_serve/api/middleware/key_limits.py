"""Limits of API keys: seconds of audio per minute, and concurrent requests.

Servers that share a job database apply the limits together. If the key of a request has limits, one transaction admits
the request. A second transaction follows at the end of the request if the request counted as concurrent (it had a
"place"), or if its audio does not count after all. While the database is unavailable, each process applies the limits
to its own requests only.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import structlog

from stable_audio_serve.core.clock import Clock, SystemClock
from stable_audio_serve.core.errors import (
    CancelledRequestError,
    DeadlineExceededError,
    ForbiddenError,
    QuotaError,
    StartTimeoutError,
    StorageError,
)
from stable_audio_serve.core.ids import ClientId
from stable_audio_serve.core.keys import ANYBODY, NO_LIMITS, ApiKey
from stable_audio_serve.core.metrics import Metrics, NullMetrics
from stable_audio_serve.jobs.store.database import Database
from stable_audio_serve.jobs.store.key_uses import LEASE_S, WINDOW_S, KeyUses, Use, Used, find_full

T = TypeVar("T")

log = structlog.get_logger("stable_audio_serve.api")

_RENEW_S = LEASE_S / 3
# Time limit of a transaction. If a transaction takes longer, this process applies the limits alone. The time limit is
# long, because several processes that apply the limits alone admit more requests in total than allowed.
_PATIENCE_S = 10.0
# The end of a response is delayed up to this time until the database no longer counts the request as concurrent.
# Otherwise the client's next request could be refused.
_LEAVING_S = 2.0
_CLOSING_S = 1.0
_LONGEST_RETRY_S = 60.0
_LEAST_AUDIO_S = 0.01  # `require_room` checks the limits for this much audio, which is less than any request generates
_MOST_NAMED = 200  # this many keys have their own label in metrics; all other keys share the label "other"


@dataclass(slots=True)
class Admission:
    """An admitted request. `counts` is true if the request's seconds of audio count against the key's limit."""

    counts: bool = False

    def give_back(self) -> None:
        """Do not count the request's audio, because none was generated."""
        self.counts = False


class KeyLimiter:
    """Applies the limits of API keys to one application's requests, on one event loop.

    Keys without limits need no database.
    """

    def __init__(
        self,
        database: Database,
        *,
        metrics: Metrics | None = None,
        clock: Clock | None = None,
        patience_s: float = _PATIENCE_S,
    ) -> None:
        """Do no I/O. The database counts as unavailable if a transaction takes longer than `patience_s`."""
        self._uses = KeyUses(database)
        self._metrics = metrics or NullMetrics()
        self._clock = clock or SystemClock()
        self._patience_s = patience_s
        # One thread, so that the transaction that ends a request runs after the transaction that admits the request.
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="key-limits")
        self._turn = asyncio.Lock()
        self._is_away = False
        self._places: set[str] = set()  # ids of requests that the database counts as concurrent
        # Requests admitted while the database was unavailable.
        self._alone: defaultdict[ClientId, dict[str, Used]] = defaultdict(dict)
        self._mean_s: defaultdict[ClientId, float] = defaultdict(lambda: 1.0)  # mean duration of a request
        self._ending: set[asyncio.Task[None]] = set()
        self._upkeep: asyncio.Task[None] | None = None
        self._labels: set[str] = set()

    @asynccontextmanager
    async def admitted(
        self, key: ApiKey, *, audio_s: float, takes_place: bool, metered_s: float | None = None
    ) -> AsyncIterator[Admission]:
        """Count a request against the limits of the key's client, then run the block.

        The `audio_s` seconds of audio count for a minute. With `takes_place`, the request also counts as a concurrent
        request until the block ends. If the block raises, the audio does not count, unless the request ran out of time
        or was cancelled. Raises QuotaError if a limit is reached, and ForbiddenError if `audio_s` exceeds the key's
        limit per minute. The metrics count `metered_s`, by default `audio_s`.
        """
        admission = Admission()
        try:
            use = self._make_use(key, audio_s=audio_s, takes_place=takes_place)
            if use is not None:
                await self._admit(use)
            began_at, admission.counts = self._clock.monotonic(), True
            try:
                yield admission
            except Exception as error:
                is_own = isinstance(error, DeadlineExceededError | CancelledRequestError)
                if not is_own or isinstance(error, StartTimeoutError):
                    admission.give_back()
                raise
            finally:
                if use is not None:
                    self._mean_s[key.client] += 0.2 * (self._clock.monotonic() - began_at - self._mean_s[key.client])
                    await self._end(use, counts=admission.counts)
        finally:
            self._count(key, audio_s=audio_s if metered_s is None else metered_s, counts=admission.counts)

    async def require_room(self, key: ApiKey, *, takes_place: bool) -> None:
        """Raise QuotaError if the key has reached a limit, so that even the smallest request would be refused."""
        use = self._make_use(key, audio_s=_LEAST_AUDIO_S, takes_place=takes_place)
        if use is None:
            return
        try:
            refusal = await self._ask(partial(self._uses.find_full, use))
        except StorageError:
            refusal = self._find_full_alone(use)
        if refusal is not None:
            self._count(key, audio_s=0.0, counts=False)
            raise refusal

    def require_possible(self, key: ApiKey, *, audio_s: float) -> None:
        """Raise ForbiddenError if `audio_s` exceeds the key's limit of seconds of audio per minute."""
        rate = key.limits.audio_seconds_per_minute
        if rate is not None and audio_s > rate:
            raise ForbiddenError(
                f"{audio_s:g} seconds of audio are more than this key may have in a minute "
                f"(audio-seconds-per-minute={rate:g})"
            )

    async def audio_left_s(self, key: ApiKey) -> float | None:
        """Return how many more seconds of audio the key may request now, None without a limit. Raises StorageError."""
        rate, use = key.limits.audio_seconds_per_minute, self._make_use(key, audio_s=0.0, takes_place=False)
        if rate is None or use is None:
            return None
        return max(0.0, rate - await self._ask(partial(self._uses.audio_s, use)))

    async def close(self) -> None:
        """Wait up to a second for the transactions that end requests."""
        if self._ending:
            await asyncio.wait(self._ending, timeout=_CLOSING_S)
        if self._upkeep is not None:
            self._upkeep.cancel()
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _make_use(self, key: ApiKey, *, audio_s: float, takes_place: bool) -> Use | None:
        """Return how much of the limits of `key` a request uses, or None if the key has no limits.

        Raises ForbiddenError if `audio_s` exceeds the key's limit per minute.
        """
        if key.limits == NO_LIMITS:
            return None
        self.require_possible(key, audio_s=audio_s)
        concurrency = key.limits.concurrency
        return Use(
            id=secrets.token_hex(8),
            client=key.client,
            limits=key.limits,
            audio_s=audio_s,
            has_place=takes_place and concurrency is not None,
            busy_retry_s=min(max(self._mean_s[key.client] / (concurrency or 1), 1.0), _LONGEST_RETRY_S),
        )

    async def _admit(self, use: Use) -> None:
        try:
            refusal = await self._ask(partial(self._uses.admit, use))
            if refusal is None and use.has_place:
                self._places.add(use.id)
                self._keep_up()
        except asyncio.CancelledError:  # the client disconnected; if the transaction still succeeds, `_end` undoes it
            await self._end(use, counts=False)
            raise
        except StorageError:
            refusal = self._find_full_alone(use)
            if refusal is None:
                self._alone[use.client][use.id] = self._clock.monotonic(), use.audio_s, int(use.has_place)
        if refusal is not None:
            raise refusal

    def _find_full_alone(self, use: Use) -> QuotaError | None:
        now, before = self._clock.monotonic(), self._alone[use.client]
        for old in [name for name, (at, _, places) in before.items() if at + WINDOW_S <= now and not places]:
            del before[old]
        return find_full(use, list(before.values()), now=now)

    async def _end(self, use: Use, *, counts: bool) -> None:
        """Stop counting a request as concurrent. If `counts` is false, its audio stops counting too."""
        self._places.discard(use.id)
        alone = self._alone[use.client]
        if use.id in alone:
            at, audio_s, _ = alone[use.id]
            alone[use.id] = at, audio_s if counts else 0.0, 0
        elif use.has_place or not counts:
            ending = asyncio.create_task(self._try_end(use, counts=counts))
            self._ending.add(ending)
            ending.add_done_callback(self._ending.discard)
            await asyncio.wait({ending}, timeout=_LEAVING_S)

    async def _try_end(self, use: Use, *, counts: bool) -> None:
        # If this transaction fails, the request counts as concurrent until its lease expires, and its audio counts.
        with suppress(StorageError):
            await self._ask(partial(self._uses.end, use, counts=counts))

    async def _ask(self, transaction: Callable[[], T]) -> T:
        """Return the result of a transaction. Raises StorageError while the database is unavailable."""
        async with self._turn:
            if self._is_away:
                raise StorageError("the job database is unavailable")
            try:
                async with asyncio.timeout(self._patience_s):
                    return await asyncio.get_running_loop().run_in_executor(self._executor, transaction)
            except (StorageError, TimeoutError) as error:
                self._note(is_away=True)
                raise StorageError("the job database does not answer") from error

    def _keep_up(self) -> None:
        if self._upkeep is None or self._upkeep.done():
            self._upkeep = asyncio.create_task(self._renew())

    async def _renew(self) -> None:
        """Repeatedly renew the leases of this process's concurrent requests in the database.

        This also detects that an unavailable database is available again.
        """
        while self._is_away or self._places:
            await asyncio.sleep(_RENEW_S)
            renew = partial(self._uses.renew, tuple(self._places))
            try:
                await asyncio.get_running_loop().run_in_executor(self._executor, renew)
            except StorageError:
                self._note(is_away=True)
            else:
                self._note(is_away=False)

    def _note(self, *, is_away: bool) -> None:
        if is_away is not self._is_away:
            self._is_away = is_away
            self._metrics.gauge("key_limits_alone", float(is_away))
            log.warning("limits of keys", kept_by="each process alone" if is_away else "all processes together")
        self._keep_up()  # `_renew` also checks whether an unavailable database is available again

    def _count(self, key: ApiKey, *, audio_s: float, counts: bool) -> None:
        """Count a request in the metrics of its key. Keys beyond the first `_MOST_NAMED` share the label "other"."""
        if key is ANYBODY:
            return
        if len(self._labels) < _MOST_NAMED:
            self._labels.add(key.label)
        label = key.label if key.label in self._labels else "other"
        self._metrics.increment("key_requests", key=label, outcome="admitted" if counts else "refused")
        self._metrics.increment("key_audio_seconds", audio_s if counts else 0.0, key=label)
