"""What one client has used of its limits: seconds of audio in the last minute, and requests at work.

Pure bookkeeping on a time that the caller gives; where an account is kept is `jobs.store.ledger`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from stable_audio_serve.core.ids import ClientId
from stable_audio_serve.core.keys import NO_LIMITS, KeyLimits

WINDOW_S = 60
_ROUNDING = 1e-6  # of sums of floats, seconds of audio

Limit = Literal["audio_seconds_per_minute", "concurrency"]


@dataclass(frozen=True, slots=True)
class Ask:
    """A request that wants to be admitted: seconds of audio, and whether it takes a place while it is at work."""

    audio_s: float
    takes_place: bool


@dataclass(frozen=True, slots=True)
class Full:
    """Why it is not admitted; `ready_in_s` is None where nobody knows."""

    limit: Limit
    ready_in_s: float | None = None


@dataclass(slots=True)
class Charge:
    """Audio that counts: `second` is when, in the time of the account that it was entered in, None before."""

    audio_s: float
    second: int | None = None


@dataclass(frozen=True, slots=True)
class Visit:
    """What one holder (a process that answers requests) has to tell and to ask about one client.

    `num_held` counts the places it holds now. `posted` was admitted without asking; `returned` does not count any more.
    """

    client: ClientId
    limits: KeyLimits = NO_LIMITS
    num_held: int = 0
    posted: Sequence[Charge] = ()
    returned: Sequence[Charge] = ()
    asks: Sequence[Ask] = ()


@dataclass(slots=True)
class Account:
    """Charges in seconds of audio by the second that they were made in, and the places of each holder with the time
    until which they count unless it comes again."""

    charges: dict[int, float] = field(default_factory=dict)
    places: dict[str, tuple[int, float]] = field(default_factory=dict)

    def settle(self, visit: Visit, now: float, *, holder: str, lease_s: float) -> list[Charge | Full]:
        """Enter what `visit` tells, and answer what it asks in order: a charge for what is admitted, or why not.

        In no 60 s more is admitted than the limit; a charge counts up to one second longer than that.
        """
        self.forget(now, lease_s=lease_s)
        for charge in visit.returned:
            self._give_back(charge)
        for charge in visit.posted:
            charge.second = self._charge(charge.audio_s, now)
        self.places.pop(holder, None)
        others = sum(count for count, _ in self.places.values())
        num_held = visit.num_held
        outcomes: list[Charge | Full] = []
        for ask in visit.asks:
            full = self._find_full(ask, visit.limits, now=now, num_places=others + num_held)
            if full is None:
                num_held += ask.takes_place
                outcomes.append(Charge(ask.audio_s, self._charge(ask.audio_s, now)))
            else:
                outcomes.append(full)
        if num_held:
            self.places[holder] = (num_held, now + lease_s)
        return outcomes

    def forget(self, now: float, *, lease_s: float) -> None:
        """Drop what no longer counts. What lies in the future, because a clock was set back, is of now."""
        latest = math.ceil(now)
        for second in [second for second in self.charges if second > latest]:
            self.charges[latest] = self.charges.get(latest, 0.0) + self.charges.pop(second)
        self.charges = {
            second: audio_s
            for second, audio_s in self.charges.items()
            if audio_s > _ROUNDING and second + WINDOW_S > now
        }
        self.places = {
            holder: (count, min(until, now + lease_s)) for holder, (count, until) in self.places.items() if until > now
        }

    def ready_in_s(self, audio_s: float, *, rate: float, now: float) -> float:
        """Returns the seconds until `audio_s` more fit into a limit of `rate` a minute; 0 = now."""
        used = sum(self.charges.values())
        ready_at = now
        for second in sorted(self.charges):
            if used + audio_s <= rate + _ROUNDING:
                break
            used -= self.charges[second]
            ready_at = max(now, second + WINDOW_S)
        return ready_at - now

    def give_back_latest(self, audio_s: float, now: float) -> None:
        """Take back what was charged in the last minute, the latest first."""
        for second in sorted(self.charges, reverse=True):
            if second + WINDOW_S > now:
                taken_s = min(audio_s, self.charges[second])
                self.charges[second] -= taken_s
                audio_s -= taken_s

    def dump(self) -> str:
        """Returns it as JSON."""
        charges = {str(second): round(audio_s, 6) for second, audio_s in self.charges.items()}
        return json.dumps({"charges": charges, "places": self.places}, separators=(",", ":"))

    @classmethod
    def load(cls, text: str) -> Account:
        """Returns what `dump` wrote."""
        found = json.loads(text)
        charges = {int(second): float(audio_s) for second, audio_s in found["charges"].items()}
        return cls(charges, {holder: (int(count), float(until)) for holder, (count, until) in found["places"].items()})

    def _find_full(self, ask: Ask, limits: KeyLimits, *, now: float, num_places: int) -> Full | None:
        if ask.takes_place and limits.concurrency is not None and num_places >= limits.concurrency:
            return Full("concurrency")
        if limits.audio_seconds_per_minute is not None:
            ready_in_s = self.ready_in_s(ask.audio_s, rate=limits.audio_seconds_per_minute, now=now)
            if ready_in_s > 0:
                return Full("audio_seconds_per_minute", ready_in_s)
        return None

    def _charge(self, audio_s: float, now: float) -> int:
        second = math.ceil(now)
        self.charges[second] = self.charges.get(second, 0.0) + audio_s
        return second

    def _give_back(self, charge: Charge) -> None:
        if charge.second in self.charges:
            self.charges[charge.second] = max(0.0, self.charges[charge.second] - charge.audio_s)
