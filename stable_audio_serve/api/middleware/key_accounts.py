"""The limits of keys as one process that answers requests keeps them, in step with all others through the ledger.

A request of a limited key asks the ledger, together with all that ask at the same time; one that is surely full is
refused from memory. While the ledger does not answer, each process keeps its share of every limit by itself, and tells
what it admitted afterwards.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial

from stable_audio_serve.api.middleware.ledger_watch import RETRY_S, SHORT_PATIENCE_S, LedgerWatch
from stable_audio_serve.api.middleware.limited_client import LEASE_S, LimitedClient, Waiting
from stable_audio_serve.core.clock import Clock, SystemClock
from stable_audio_serve.core.errors import (
    CancelledRequestError,
    DeadlineExceededError,
    ForbiddenError,
    StartTimeoutError,
    StorageError,
)
from stable_audio_serve.core.ids import ClientId
from stable_audio_serve.core.keys import ANYBODY, NO_LIMITS, ApiKey
from stable_audio_serve.core.metrics import Metrics, NullMetrics
from stable_audio_serve.jobs.store.account import Ask, Charge, Full
from stable_audio_serve.jobs.store.database import Database
from stable_audio_serve.jobs.store.ledger import Ledger, Settled

_RENEW_S = LEASE_S / 3
_PATIENCE_S = 10.0  # then the ledger is away: long enough for a busy machine, because each process alone admits more
# Longest an answer waits until others may have its place, because its client may ask another process next. It takes
# a transaction: milliseconds, on a busy machine hundreds of them.
_LEAVING_S = 2.0
_LEAST_AUDIO_S = 0.01  # less than anybody asks for
_MOST_TOGETHER = 100  # clients of one transaction
_MOST_NAMED = 200  # clients that metrics tell apart


@dataclass(slots=True)
class Admission:
    """What became of a request: whether its audio counts."""

    counts: bool = False

    def give_back(self) -> None:
        """Let its audio not count: nothing was made of it."""
        self.counts = False


class Accounts:
    """One per application; belongs to one event loop. Clients whose keys have no limits cost nothing."""

    def __init__(
        self,
        database: Database,
        *,
        num_processes: int,
        metrics: Metrics | None = None,
        clock: Clock | None = None,
        patience_s: float = _PATIENCE_S,
    ) -> None:
        """`num_processes` share a limit while the database is away: after `patience_s` without an answer it is.

        Touches nothing yet.
        """
        self._ledger = Ledger(database)
        self._num_processes = num_processes
        self._metrics = metrics or NullMetrics()
        self._clock = clock or SystemClock()
        self._watch = LedgerWatch(self._clock, metrics=self._metrics, patience_s=patience_s)
        self._holder = secrets.token_hex(8)
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="accounts")
        self._clients: dict[ClientId, LimitedClient] = {}
        self._telling: dict[ClientId, LimitedClient] = {}  # those with something to tell or to ask
        self._working: asyncio.Task[None] | None = None
        self._woken = asyncio.Event()
        self._renew_at = 0.0
        self._labels: set[str] = set()

    @asynccontextmanager
    async def admitted(self, key: ApiKey, *, audio_s: float, takes_place: bool) -> AsyncIterator[Admission]:
        """Charge `audio_s` to the key's client, and hold a place of it for the length of the block.

        The audio does not count when the block raises, unless it ran out of its own time or its client went away.
        Raises QuotaError, and ForbiddenError for more audio than the key may have in a whole minute.
        """
        label = self._label(key)
        admission = Admission()
        try:
            async with self._held(key, Ask(audio_s, takes_place), admission):
                yield admission
        finally:
            if label is not None:
                outcome = "admitted" if admission.counts else "refused"
                self._metrics.increment("key_requests", key=label, outcome=outcome)
                self._metrics.increment("key_audio_seconds", audio_s if admission.counts else 0.0, key=label)

    async def require_room(self, key: ApiKey, *, takes_place: bool) -> None:
        """Raise QuotaError if nothing more is admitted for this key now, however little is asked; charges nothing.

        Where that cannot be known soon it is left to `admitted`.
        """
        if key.limits == NO_LIMITS:
            return
        client, ask = self._client(key), Ask(_LEAST_AUDIO_S, takes_place)
        full = client.find_full(ask, self._clock.monotonic())
        if full is None:
            self._tell(client)
            await self._told(client, patience_s=SHORT_PATIENCE_S)
            full = client.find_full_anywhere(ask, self._clock.monotonic(), holder=self._holder)
        if full is not None:
            self._metrics.increment("key_requests", key=self._label(key) or "", outcome="refused")
            raise client.refusal(full)

    async def close(self) -> None:
        """Tell what is left to tell, within a moment."""
        if self._working is not None:
            await asyncio.wait({self._working}, timeout=RETRY_S)
            self._working.cancel()
            await asyncio.gather(self._working, return_exceptions=True)
        self._executor.shutdown(wait=False, cancel_futures=True)

    @asynccontextmanager
    async def _held(self, key: ApiKey, ask: Ask, admission: Admission) -> AsyncIterator[None]:  # noqa: PLR0917
        admitted = None if key.limits == NO_LIMITS else await self._admit(key, ask)
        began_at = self._clock.monotonic()
        admission.counts = True
        try:
            yield
        except Exception as error:
            is_own = isinstance(error, DeadlineExceededError | CancelledRequestError)
            if not is_own or isinstance(error, StartTimeoutError):
                admission.give_back()
            raise
        finally:
            if admitted is not None:
                self._leave(*admitted, ask, taken_s=self._clock.monotonic() - began_at, counts=admission.counts)
        if admitted is not None and ask.takes_place and admitted[0].limits.concurrency is not None:
            await self._told(admitted[0], patience_s=_LEAVING_S)

    def _leave(self, client: LimitedClient, charge: Charge, ask: Ask, *, taken_s: float, counts: bool) -> None:  # noqa: PLR0917
        client.note_time(taken_s)
        client.num_held -= ask.takes_place
        if not counts:
            client.give_back(charge, self._clock.monotonic())
        if not counts or (ask.takes_place and client.limits.concurrency is not None):
            self._tell(client)

    async def _admit(self, key: ApiKey, ask: Ask) -> tuple[LimitedClient, Charge]:
        rate = key.limits.audio_seconds_per_minute
        if rate is not None and ask.audio_s > rate:
            raise ForbiddenError(
                f"{ask.audio_s:g} seconds of audio are more than this key may have in a minute "
                f"(audio-seconds-per-minute={rate:g})"
            )
        client = self._client(key)
        outcome = client.find_full(ask, self._clock.monotonic()) or await self._ask(client, ask)
        if isinstance(outcome, Full):
            raise client.refusal(outcome)
        return client, outcome

    def _client(self, key: ApiKey) -> LimitedClient:
        client = self._clients.setdefault(key.client, LimitedClient(key.client, key.limits))
        client.limits = key.limits
        return client

    async def _ask(self, client: LimitedClient, ask: Ask) -> Charge | Full:
        """Returns the ledger's answer, or this process's own while the ledger does not answer."""
        if self._watch.is_silent:
            return self._decide_alone(client, ask)
        future: asyncio.Future[Charge | Full | None] = asyncio.get_running_loop().create_future()
        client.waiting.append((ask, future))
        self._tell(client)
        try:
            await asyncio.wait({future}, timeout=self._watch.patience_s)
        except asyncio.CancelledError:
            answer = future.result() if future.done() else None
            future.cancel()
            if isinstance(answer, Charge):
                self._undo(client, answer, ask)
            raise
        if not future.done():
            self._watch.give_up()
        answer = future.result() if future.done() else None
        future.cancel()  # if it is answered after all, that is undone
        return self._decide_alone(client, ask) if answer is None else answer

    def _decide_alone(self, client: LimitedClient, ask: Ask) -> Charge | Full:
        outcome = client.decide_alone(ask, self._clock.monotonic(), num_processes=self._num_processes)
        self._tell(client)
        return outcome

    def _undo(self, client: LimitedClient, charge: Charge, ask: Ask) -> None:  # noqa: PLR0917
        """Nobody waits for what was admitted any more."""
        client.num_held -= ask.takes_place
        client.give_back(charge, self._clock.monotonic())
        self._tell(client)

    async def _told(self, client: LimitedClient, *, patience_s: float) -> None:
        """Wait until the ledger knows, for a moment."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        client.leaving.append(future)
        if not self._watch.is_silent:
            await asyncio.wait({future}, timeout=patience_s)
        future.cancel()

    def _tell(self, client: LimitedClient) -> None:
        self._telling[client.id] = client
        self._woken.set()
        if self._working is None or self._working.done():
            self._working = asyncio.create_task(self._work())

    async def _work(self) -> None:
        """Settle with the ledger until there is nothing to tell and no place to keep."""
        while True:
            self._woken.clear()
            now = self._clock.monotonic()
            holding = [client for client in self._clients.values() if client.has_places]
            if now >= self._renew_at:
                self._telling.update((client.id, client) for client in holding)
                self._renew_at = now + _RENEW_S
            if self._telling:
                await self._settle([self._telling.pop(name) for name in list(self._telling)[:_MOST_TOGETHER]])
            elif not holding:
                return
            else:
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._renew_at - now):
                        await self._woken.wait()

    async def _settle(self, clients: Sequence[LimitedClient]) -> None:
        asked = [[(ask, future) for ask, future in client.waiting if not future.done()] for client in clients]
        leaving = [future for client in clients for future in client.leaving]
        visits = [
            client.make_visit([ask for ask, _ in waiting]) for client, waiting in zip(clients, asked, strict=True)
        ]
        for client in clients:
            client.waiting, client.leaving = [], []
        settle = partial(self._ledger.settle, self._holder, visits, lease_s=LEASE_S)
        try:
            with self._watch.transaction():
                settled = await asyncio.get_running_loop().run_in_executor(self._executor, settle)
        except StorageError:
            now = self._clock.monotonic()
            for client, visit in zip(clients, visits, strict=True):
                client.take_back(visit, now)
                self._telling[client.id] = client
            for _, future in (each for waiting in asked for each in waiting if not each[1].done()):
                future.set_result(None)
            await asyncio.sleep(RETRY_S)
            return
        for each in (future for future in leaving if not future.done()):
            each.set_result(None)
        for client, waiting, one in zip(clients, asked, settled, strict=True):
            self._answer(client, waiting, one)

    def _answer(self, client: LimitedClient, waiting: Sequence[Waiting], settled: Settled) -> None:  # noqa: PLR0917
        client.seen, client.seen_at = settled, self._clock.monotonic()
        for (ask, future), outcome in zip(waiting, settled.outcomes, strict=True):
            if isinstance(outcome, Charge):
                client.num_held += ask.takes_place
                client.enter(outcome, self._clock.monotonic())
            if not future.done():
                future.set_result(outcome)
            elif isinstance(outcome, Charge):
                self._undo(client, outcome, ask)

    def _label(self, key: ApiKey) -> str | None:
        """Returns what metrics call the client; a bounded number of names."""
        if key is ANYBODY:
            return None
        if len(self._labels) < _MOST_NAMED:
            self._labels.add(key.label)
        return key.label if key.label in self._labels else "other"
