"""Track the work of a model's replicas in a process that calls them: their last reports, and the calls sent since.

This module does not import Ray or torch. No operation takes longer when there are more calls in flight.
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
# A replica that was chosen for a call normally accepts the call soon. If it does not within this time, the call no
# longer counts as work of the replica: the caller has disconnected, or the replica was full.
_CHOSEN_S = 1.0
# A report that seems older than this when it arrives is treated as if it were this old. The clocks of the replica's
# machine and of this machine probably differ.
_MOST_AGE_S = 5.0
_LOAD_MS = 300.0  # of one adapter


@dataclass(frozen=True, slots=True)
class ReplicaWork:
    """A replica's report of its work at the time `said_at` (Unix time in seconds).

    `backlog_ms` is the predicted device time of all accepted, unfinished requests. `prices` predict the device time of
    any request.
    `adapters` has the hashes of the adapter files in memory.
    """

    said_at: float
    backlog_ms: float
    prices: Prices
    adapters: tuple[str, ...] = ()

    @classmethod
    def now(cls, backlog_ms: float, prices: Prices, *, adapters: Sequence[str] = ()) -> ReplicaWork:
        """Return a report with the current time."""
        return cls(time.time(), backlog_ms, prices, tuple(adapters))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name, because Ray Serve's controller sends statistics to the routers as a dict."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ReplicaWork | None:
        """Return the report that `to_dict` converted to `values`.

        Returns None for other values, such as the report of a replica with another version of this package.
        """
        try:
            prices = Prices.from_dict(values["prices"])
            return cls(float(values["said_at"]), float(values["backlog_ms"]), prices, tuple(values["adapters"]))
        except (KeyError, TypeError, ValueError):
            return None


@dataclass(slots=True)
class _Call:
    """A call to a replica, made at the time `at`. `ms` is its predicted device time, or 0 if it no longer counts."""

    at: float
    ms: float
    request_id: str = ""


class _Calls:
    """A queue of calls, the oldest first, and the sum of their predicted device time."""

    def __init__(self) -> None:
        self._calls: deque[_Call] = deque()
        self.total_ms = 0.0

    @property
    def oldest(self) -> _Call | None:
        """The oldest call that still counts, None if there is none."""
        return self._calls[0] if self._calls else None

    def add(self, call: _Call) -> None:
        self._calls.append(call)
        self.total_ms += call.ms

    def drop(self, call: _Call) -> None:
        """Remove the call's time from the sum. The call itself stays in the queue until all older calls are dropped."""
        self.total_ms -= call.ms
        call.ms = 0.0
        while self._calls and self._calls[0].ms == 0.0:
            self._calls.popleft()
        if not self._calls:
            self.total_ms = 0.0  # after rounding errors, the sum may differ from 0

    def drop_before(self, at: float) -> Iterator[_Call]:
        """Drop the calls that were made before `at`, and yield them."""
        while self._calls and self._calls[0].at < at:
            yield self._calls[0]
            self.drop(self._calls[0])


class _Replica:
    """The last report of one replica, and the calls to the replica that the report does not include."""

    def __init__(self, now: float) -> None:
        self.work: ReplicaWork | None = None
        self.reported_at = now
        self._published_at = now  # when the report was made, by the clock of this process
        self.chosen = _Calls()
        self._sent = _Calls()
        self._by_id: defaultdict[str, deque[_Call]] = defaultdict(deque)  # several calls may have the same id

    def record(self, work: ReplicaWork, *, now: float, age_s: float) -> None:
        if self.work is not None and self.work.said_at == work.said_at:
            return
        self.work, self.reported_at = work, now
        self._published_at = now - min(max(age_s, 0.0), _MOST_AGE_S)
        for call in self._sent.drop_before(self._published_at):
            self._forget(call.request_id)

    def left_ms(self, now: float) -> float:
        for _ in self.chosen.drop_before(now - _CHOSEN_S):
            pass
        reported_ms = self.work.backlog_ms - (now - self._published_at) * 1000.0 if self.work else 0.0
        return max(0.0, reported_ms) + self.chosen.total_ms + self._sent.total_ms

    def send(self, call: _Call) -> None:
        self._sent.add(call)
        self._by_id[call.request_id].append(call)

    def end(self, request_id: str) -> None:
        if request_id in self._by_id:
            self._sent.drop(self._forget(request_id))

    def _forget(self, request_id: str) -> _Call:
        """Remove the oldest call with this id from `_by_id`, and return it."""
        calls = self._by_id[request_id]
        call = calls.popleft()
        if not calls:
            del self._by_id[request_id]
        return call


class WorkLedger:
    """Predicts the remaining work of each replica of one model. Replicas are identified by name. Not thread-safe."""

    def __init__(
        self,
        *,
        old_after_s: float = OLD_S,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """A replica's report is old after `old_after_s` seconds (`is_old`).

        `clock` returns the seconds since any fixed point. `wall` returns Unix time in seconds, like
        `ReplicaWork.said_at`.
        """
        self._old_after_s = old_after_s
        self._clock = clock
        self._wall = wall
        self._replicas: dict[str, _Replica] = {}

    def update(self, reports: Mapping[str, Mapping[str, Any]]) -> None:
        """Record the latest report of every replica, by the replica's name.

        The report of a replica that has not reported yet is empty. Replicas that are missing in `reports` are dropped.
        """
        now, wall = self._clock(), self._wall()
        self._replicas = {name: self._replicas.get(name) or _Replica(now) for name in reports}
        for name, report in reports.items():
            if (work := ReplicaWork.from_dict(report)) is not None:
                self._replicas[name].record(work, now=now, age_s=wall - work.said_at)

    def is_old(self, replica: str) -> bool:
        """Return True if the replica's last report arrived more than `old_after_s` ago.

        For a replica that has not reported yet, the time counts from the call of `update` that first contained it.
        """
        return self._clock() - self._replicas[replica].reported_at > self._old_after_s

    def left_ms(self, replica: str) -> float:
        """Return the predicted device time of the replica's remaining work, in milliseconds.

        This is the backlog in the replica's last report, minus the time since then, plus the predicted time of the
        calls since then.
        """
        return self._replicas[replica].left_ms(self._clock())

    def price_ms(self, replica: str, call: Sequence[object]) -> float:
        """Return the predicted device time of a call with these arguments on this replica, in milliseconds.

        It is 0 for a call that does not generate audio, and 1 for a generation if no replica has reported prices yet.
        """
        if not call or not isinstance(call[0], GenerationRequest):
            return 0.0
        works = (self._replicas[name].work for name in (replica, *self._replicas) if name in self._replicas)
        work = next((work for work in works if work is not None), None)
        return work.prices.of_request(call[0]) if work else 1.0

    def load_ms(self, replica: str, call: Sequence[object]) -> float:
        """Return about how long the replica takes to load the call's adapters that are not in its memory, in ms."""
        if not call or not isinstance(call[0], GenerationRequest) or not call[0].loras:
            return 0.0
        work = self._replicas[replica].work
        known = work.adapters if work else ()
        return _LOAD_MS * len({lora.sha256 for lora in call[0].loras} - {*known})

    def choose(self, *, replica: str, ms: float) -> None:
        """Record that a replica was chosen for a call that takes `ms`.

        From now on, the call counts as work of the replica. If many calls arrive together, replicas are chosen for all
        of them before the first call is accepted.
        """
        if ms > 0:
            self._replicas[replica].chosen.add(_Call(self._clock(), ms))

    def arrive(self, *, replica: str, request_id: str, ms: float) -> None:
        """Record that a replica has accepted a call that takes `ms`.

        This ends the oldest choice (see `choose`) of this replica, so that the call does not count twice. If no choice
        of this replica is left, the oldest choice among all replicas ends.
        """
        known = self._replicas.get(replica)
        if known is None or ms <= 0:
            return
        own = known if known.chosen.oldest else min(self._replicas.values(), key=_oldest_choice)
        if own.chosen.oldest:
            own.chosen.drop(own.chosen.oldest)
        known.send(_Call(self._clock(), ms, request_id))

    def end(self, request_id: str, *, replica: str) -> None:
        """Record that a replica has finished a call with this id. Does nothing if the replica never accepted it."""
        if (known := self._replicas.get(replica)) is not None:
            known.end(request_id)


def _oldest_choice(replica: _Replica) -> float:
    return replica.chosen.oldest.at if replica.chosen.oldest else float("inf")
