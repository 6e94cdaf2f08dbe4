"""What a caller of a model's replicas knows of their work: what they said last, and what it has sent them since then.
Knows neither Ray nor torch; every cost is the same for 10,000 calls in flight as for one.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from stable_audio_serve.core.generation import GenerationRequest
from stable_audio_serve.core.pricing import Prices

OLD_S = 5.0
_CHOSEN_S = 1.0  # a choice that is older was not used: its caller left, or the replica was full
_MOST_AGE_S = 5.0  # of a report when it arrives: Serve's controller brings it, and clocks of machines may differ


@dataclass(frozen=True, slots=True)
class ReplicaWork:
    """What a replica publishes: the device time of all it had accepted at `said_at`, Unix seconds, and its prices."""

    said_at: float
    backlog_ms: float
    prices: Prices

    @classmethod
    def now(cls, backlog_ms: float, prices: Prices) -> ReplicaWork:
        """Returns what the calling replica says now."""
        return cls(time.time(), backlog_ms, prices)

    def to_dict(self) -> dict[str, Any]:
        """Returns what crosses Serve's controller."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ReplicaWork | None:
        """Returns what `to_dict` was made of; None for anything else, such as the words of another version."""
        try:
            return cls(float(values["said_at"]), float(values["backlog_ms"]), Prices.from_dict(values["prices"]))
        except (KeyError, TypeError, ValueError):
            return None


@dataclass(slots=True)
class _Call:
    """`ms` is 0 once the call no longer counts."""

    at: float
    ms: float
    request_id: str = ""


class _Calls:
    """Calls, oldest first, and the sum of those that count."""

    def __init__(self) -> None:
        self._calls: deque[_Call] = deque()
        self.total_ms = 0.0

    @property
    def oldest(self) -> _Call | None:
        """The oldest one that counts."""
        return self._calls[0] if self._calls else None

    def add(self, call: _Call) -> None:
        self._calls.append(call)
        self.total_ms += call.ms

    def drop(self, call: _Call) -> None:
        """Stop counting a call of these."""
        self.total_ms -= call.ms
        call.ms = 0.0
        while self._calls and self._calls[0].ms == 0.0:
            self._calls.popleft()
        if not self._calls:
            self.total_ms = 0.0  # a sum of floats does not come back to it by itself

    def drop_before(self, at: float) -> Iterator[_Call]:
        """Stop counting older calls; yields each."""
        while self._calls and self._calls[0].at < at:
            yield self._calls[0]
            self.drop(self._calls[0])


class _Replica:
    """One replica's last word, and the calls that are not counted in it."""

    def __init__(self, now: float) -> None:
        self.work: ReplicaWork | None = None
        self.heard_at = now
        self._said_at = now  # on the clock of this process
        self.chosen = _Calls()
        self._sent = _Calls()
        self._by_id: defaultdict[str, deque[_Call]] = defaultdict(deque)  # several calls may have one id

    def hear(self, work: ReplicaWork, *, now: float, age_s: float) -> None:
        if self.work is not None and self.work.said_at == work.said_at:
            return
        self.work, self.heard_at = work, now
        self._said_at = now - min(max(age_s, 0.0), _MOST_AGE_S)
        for call in self._sent.drop_before(self._said_at):
            self._forget(call.request_id)

    def left_ms(self, now: float) -> float:
        for _ in self.chosen.drop_before(now - _CHOSEN_S):
            pass
        said_ms = self.work.backlog_ms - (now - self._said_at) * 1000.0 if self.work else 0.0
        return max(0.0, said_ms) + self.chosen.total_ms + self._sent.total_ms

    def send(self, call: _Call) -> None:
        self._sent.add(call)
        self._by_id[call.request_id].append(call)

    def end(self, request_id: str) -> None:
        if request_id in self._by_id:
            self._sent.drop(self._forget(request_id))

    def _forget(self, request_id: str) -> _Call:
        """Returns the oldest call of this id that counts, which then cannot be found by it."""
        calls = self._by_id[request_id]
        call = calls.popleft()
        if not calls:
            del self._by_id[request_id]
        return call


class WorkLedger:
    """The replicas of one model by name. Not thread-safe."""

    def __init__(
        self,
        *,
        old_after_s: float = OLD_S,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """A replica that has said nothing for `old_after_s` is not relied on. `clock` and `wall` return seconds, `wall`
        those of `ReplicaWork.said_at`.
        """
        self._old_after_s = old_after_s
        self._clock = clock
        self._wall = wall
        self._replicas: dict[str, _Replica] = {}

    def update(self, words: Mapping[str, Mapping[str, Any]]) -> None:
        """Note which replicas there are and what each said last: empty if nothing yet. Others are forgotten."""
        now, wall = self._clock(), self._wall()
        self._replicas = {name: self._replicas.get(name) or _Replica(now) for name in words}
        for name, word in words.items():
            if (work := ReplicaWork.from_dict(word)) is not None:
                self._replicas[name].hear(work, now=now, age_s=wall - work.said_at)

    def is_old(self, replica: str) -> bool:
        """Whether a replica has said nothing for too long; a new one has until then to say something."""
        return self._clock() - self._replicas[replica].heard_at > self._old_after_s

    def left_ms(self, replica: str) -> float:
        """Returns the predicted work that a replica has not done yet, as far as this process can know."""
        return self._replicas[replica].left_ms(self._clock())

    def price_ms(self, replica: str, call: Sequence[object]) -> float:
        """Returns the device time of a call with these arguments, 0 if it asks for no audio.

        While no price is known, calls count alike.
        """
        if not call or not isinstance(call[0], GenerationRequest):
            return 0.0
        works = (self._replicas[name].work for name in (replica, *self._replicas) if name in self._replicas)
        work = next((work for work in works if work is not None), None)
        return work.prices.of_request(call[0]) if work else 1.0

    def choose(self, *, replica: str, ms: float) -> None:
        """Note that a call is about to be sent: of a burst, all are chosen before one is accepted."""
        if ms > 0:
            self._replicas[replica].chosen.add(_Call(self._clock(), ms))

    def arrive(self, *, replica: str, request_id: str, ms: float) -> None:
        """Note that a replica has accepted a call. If another one was chosen for it, that one goes elsewhere."""
        known = self._replicas.get(replica)
        if known is None or ms <= 0:
            return
        own = known if known.chosen.oldest else min(self._replicas.values(), key=_oldest_choice)
        if own.chosen.oldest:
            own.chosen.drop(own.chosen.oldest)
        known.send(_Call(self._clock(), ms, request_id))

    def end(self, request_id: str, *, replica: str) -> None:
        """Note that a replica is done with a call of this id; one that it never accepted changes nothing."""
        if (known := self._replicas.get(replica)) is not None:
            known.end(request_id)


def _oldest_choice(replica: _Replica) -> float:
    return replica.chosen.oldest.at if replica.chosen.oldest else float("inf")
