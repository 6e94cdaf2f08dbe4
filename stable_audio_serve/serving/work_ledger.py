"""Track the work of a model's replicas in a process that calls them: their last reports, and the calls sent since.

This module does not import Ray or torch. A call's start and end take no longer when there are more calls in flight.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from pydantic import TypeAdapter, ValidationError

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


_WORK = TypeAdapter(ReplicaWork)


def parse_work(values: Mapping[str, Any]) -> ReplicaWork | None:
    """Return the report that `ReplicaWork.to_dict` converted to `values`.

    Returns None for other values, such as the report of a replica with another version of this package.
    """
    try:
        return _WORK.validate_python(values)
    except ValidationError:
        return None


class _Call(NamedTuple):
    """A call to a replica, made at the time `at`. `ms` is its predicted device time."""

    at: float
    ms: float


class _Replica:
    """The last report of one replica, and the calls to the replica that the report does not include."""

    def __init__(self, now: float) -> None:
        self.work: ReplicaWork | None = None
        self.reported_at = now
        self._published_at = now  # when the report was made, by the clock of this process
        self.chosen: deque[_Call] = deque()  # the oldest first
        self._sent: dict[str, list[_Call]] = {}  # by request id, which several calls may share
        self._sent_ms = 0.0

    def record(self, work: ReplicaWork, *, now: float, age_s: float) -> None:
        if self.work is not None and self.work.said_at == work.said_at:
            return
        self.work, self.reported_at = work, now
        self._published_at = now - min(max(age_s, 0.0), _MOST_AGE_S)
        later = {name: [call for call in calls if call.at >= self._published_at] for name, calls in self._sent.items()}
        self._sent = {name: calls for name, calls in later.items() if calls}
        self._sent_ms = sum(call.ms for calls in self._sent.values() for call in calls)

    def left_ms(self, now: float) -> float:
        while self.chosen and self.chosen[0].at < now - _CHOSEN_S:
            self.chosen.popleft()
        reported_ms = self.work.backlog_ms - (now - self._published_at) * 1000.0 if self.work else 0.0
        return max(0.0, reported_ms) + sum(call.ms for call in self.chosen) + self._sent_ms

    def send(self, request_id: str, call: _Call) -> None:
        self._sent.setdefault(request_id, []).append(call)
        self._sent_ms += call.ms

    def end(self, request_id: str) -> None:
        if calls := self._sent.get(request_id):
            self._sent_ms -= calls.pop(0).ms
            if not calls:
                del self._sent[request_id]
            if not self._sent:
                self._sent_ms = 0.0  # after rounding errors, the sum may differ from 0


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
            if (work := parse_work(report)) is not None:
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
            self._replicas[replica].chosen.append(_Call(self._clock(), ms))

    def arrive(self, *, replica: str, request_id: str, ms: float) -> None:
        """Record that a replica has accepted a call that takes `ms`.

        This ends the oldest choice (see `choose`) of this replica, so that the call does not count twice. If no choice
        of this replica is left, the oldest choice among all replicas ends.
        """
        known = self._replicas.get(replica)
        if known is None or ms <= 0:
            return
        own = known if known.chosen else min(self._replicas.values(), key=_oldest_choice)
        if own.chosen:
            own.chosen.popleft()
        known.send(request_id, _Call(self._clock(), ms))

    def end(self, request_id: str, *, replica: str) -> None:
        """Record that a replica has finished a call with this id. Does nothing if the replica never accepted it."""
        if (known := self._replicas.get(replica)) is not None:
            known.end(request_id)


def _oldest_choice(replica: _Replica) -> float:
    return replica.chosen[0].at if replica.chosen else float("inf")
