"""What one process knows of one client with limits: the places it holds, what it has to tell the ledger, and when it
can answer without asking. Never waits: `key_accounts` talks to the ledger.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from stable_audio_serve.core.errors import QuotaError
from stable_audio_serve.core.ids import ClientId
from stable_audio_serve.core.keys import KeyLimits
from stable_audio_serve.jobs.store.account import WINDOW_S, Account, Ask, Charge, Full, Visit
from stable_audio_serve.jobs.store.ledger import Settled

LEASE_S = 15.0  # how long the places of a process count that has died

_FRESH_S = 1.0  # how long audio that is used up is believed without asking again: another process may give some back
_LONGEST_RETRY_S = 60.0
_OWN = "own"  # the one holder of a process's own account

Waiting = tuple[Ask, "asyncio.Future[Charge | Full | None]"]


@dataclass(slots=True)
class LimitedClient:
    """One client of one process. `own` is what the process admitted, in the process's own time, seconds."""

    id: ClientId
    limits: KeyLimits
    own: Account = field(default_factory=Account)
    num_held: int = 0
    waiting: list[Waiting] = field(default_factory=list)
    leaving: list[asyncio.Future[None]] = field(default_factory=list)  # that wait until the ledger knows
    posted: deque[tuple[float, Charge]] = field(default_factory=deque)  # admitted alone, and when
    returned: list[Charge] = field(default_factory=list)
    seen: Settled | None = None
    seen_at: float = 0.0
    mean_s: float = 1.0  # how long a request takes, seconds

    @property
    def has_places(self) -> bool:
        """Whether the ledger must be told again and again that places are held."""
        return bool(self.num_held) and self.limits.concurrency is not None

    def find_full(self, ask: Ask, now: float) -> Full | None:
        """Returns why it is refused where that is known without asking."""
        concurrency, rate = self.limits.concurrency, self.limits.audio_seconds_per_minute
        if ask.takes_place and concurrency is not None and self.num_held >= concurrency:
            return Full("concurrency")
        seen, age_s = self.seen, now - self.seen_at
        if seen is not None and age_s < _FRESH_S and rate is not None:
            ready_in_s = seen.account.ready_in_s(ask.audio_s, rate=rate, now=seen.now + age_s)
            if ready_in_s > 0:
                return Full("audio_seconds_per_minute", ready_in_s)
        return None

    def find_full_anywhere(self, ask: Ask, now: float, *, holder: str) -> Full | None:
        """Returns the same, with what processes other than `holder` have at work, if the ledger has just said it."""
        full, seen, concurrency = self.find_full(ask, now), self.seen, self.limits.concurrency
        if full is not None or seen is None or now - self.seen_at >= _FRESH_S:
            return full
        others = sum(count for name, (count, _) in seen.account.places.items() if name != holder)
        is_full = ask.takes_place and concurrency is not None and others + self.num_held >= concurrency
        return Full("concurrency") if is_full else None

    def decide_alone(self, ask: Ask, now: float, *, num_processes: int) -> Charge | Full:
        """Admit or refuse by this process's share of the limits. The ledger is told later."""
        visit = Visit(self.id, _share(self.limits, num_processes), self.num_held, asks=[ask])
        (outcome,) = self.own.settle(visit, now, holder=_OWN, lease_s=LEASE_S)
        if isinstance(outcome, Full):
            return outcome
        while self.posted and self.posted[0][0] < now - WINDOW_S:  # too old to count anywhere
            self.posted.popleft()
        charge = Charge(ask.audio_s)
        self.posted.append((now, charge))
        self.num_held += ask.takes_place
        return charge

    def enter(self, charge: Charge, now: float) -> None:
        """Count what the ledger admitted as used by this process, too."""
        self.own.settle(Visit(self.id, posted=[Charge(charge.audio_s)]), now, holder=_OWN, lease_s=LEASE_S)

    def give_back(self, charge: Charge, now: float) -> None:
        """Let it not count."""
        self.own.give_back_latest(charge.audio_s, now)
        self.returned.append(charge)
        self.seen = None

    def note_time(self, taken_s: float) -> None:
        """Learn how long a request took."""
        self.mean_s += 0.2 * (taken_s - self.mean_s)

    def make_visit(self, asks: Sequence[Ask]) -> Visit:
        """Returns all that there is to tell, which then counts as told."""
        posted = {id(charge): charge for _, charge in self.posted}
        # What was given back before anybody heard of it needs no telling.
        returned = [charge for charge in self.returned if posted.pop(id(charge), None) is None]
        self.posted.clear()
        self.returned.clear()
        num_held = self.num_held if self.limits.concurrency is not None else 0
        return Visit(self.id, self.limits, num_held, list(posted.values()), returned, asks)

    def take_back(self, visit: Visit, now: float) -> None:
        """The ledger did not hear of this visit."""
        self.posted.extendleft((now, charge) for charge in reversed(visit.posted))
        self.returned[:0] = visit.returned

    def refusal(self, full: Full) -> QuotaError:
        """Returns the error for the client, which says when to come again."""
        limits = self.limits
        if full.limit == "concurrency":
            retry_after_s = min(max(self.mean_s / (limits.concurrency or 1), 1.0), _LONGEST_RETRY_S)
            message = f"this key has as many requests at work as it may have (concurrency={limits.concurrency})"
            return QuotaError(message, retry_after_s=retry_after_s)
        message = (
            "this key has used up its seconds of audio of this minute "
            f"(audio-seconds-per-minute={limits.audio_seconds_per_minute:g})"
        )
        return QuotaError(message, retry_after_s=full.ready_in_s)


def _share(limits: KeyLimits, num_processes: int) -> KeyLimits:
    rate, concurrency = limits.audio_seconds_per_minute, limits.concurrency
    return KeyLimits(
        None if rate is None else rate / num_processes,
        None if concurrency is None else max(1, concurrency // num_processes),
    )
