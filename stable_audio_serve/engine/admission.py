"""Limits the accepted, unfinished work to `max_queue_s` seconds of predicted device time. A request beyond the limit is
refused at once, with a retry time. The predictions are multiplied by the recent ratio of measured to predicted time,
because other programs and the sending of responses slow the machine down. Thread-safe.

For an interactive request, only interactive work counts towards the limit, so batch work never causes its refusal. For
a batch request, all work counts.

One client may hold at most three quarters of the limit. When the queue is full, a request is still accepted if its
client and all clients with less work hold at most a quarter of the limit together. A client with many or long requests
can therefore not shut out the others.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Mapping
from itertools import chain
from typing import NamedTuple

from stable_audio_serve.core.clock import Clock, SystemClock
from stable_audio_serve.core.errors import OverloadedError
from stable_audio_serve.core.generation import Priority

_LEAST_RETRY_S = 0.1
_CLIENT_SHARE = 0.75  # the largest share of the limit that one client may hold
_RESERVE_SHARE = 0.25  # when the queue is full, clients with little work may hold this fraction of the limit together
_MOST_REFUSED_MS = 600_000.0
_MOST_CLIENTS = 1000  # refused requests are remembered for at most this many clients
_WINDOW_MS = 1000.0  # measured time between two updates of `Pace.value`
_NEWEST_WEIGHT = 0.3
_PACE_RANGE = (0.5, 4.0)
_MANY = 4  # with fewer requests, device calls may be too small to measure the typical speed


class _Refused(NamedTuple):
    """Predicted work that was refused at time `at` and that the client is expected to send again."""

    work_ms: float
    at: float

    def left_ms(self, now: float) -> float:
        """Return `work_ms` minus the milliseconds since `at`, at least 0."""
        return max(0.0, self.work_ms - (now - self.at) * 1000.0)


_NOTHING_REFUSED = _Refused(0.0, 0.0)


class Pace:
    """The ratio of measured to predicted device time (`value`), averaged over periods with a long queue."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._measured_at: float | None = None  # None: the queue was too short to measure
        self._busy_ms = self._done_ms = 0.0
        self.value = 1.0

    def record(self, *, done_ms: float, is_deep: bool) -> None:
        """Record `done_ms`, the predicted time of the work that was finished since the last `record`.

        `is_deep` says whether the queue is long. If it is not, the time until the next `record` is not measured,
        because the device may idle or run small batches, so that its speed would be underestimated.
        """
        now = self._clock.monotonic()
        if self._measured_at is not None:
            self._busy_ms += (now - self._measured_at) * 1000.0
            self._done_ms += done_ms
        self._measured_at = now if is_deep else None
        if self._busy_ms >= _WINDOW_MS:
            low, high = _PACE_RANGE
            measured = min(max(self._busy_ms / max(self._done_ms, 1e-3), low), high)
            self.value += _NEWEST_WEIGHT * (measured - self.value)
            self._busy_ms = self._done_ms = 0.0


class Admission:
    """Tracks the predicted work of accepted requests, and refuses a request if too much work is ahead of it."""

    def __init__(self, max_queue_s: float, *, batch_share: float = 0.0, clock: Clock = SystemClock()) -> None:
        """`batch_share` is the device time that batch work gets while interactive work runs, as a fraction of the time
        of the interactive work.
        """
        self._max_ms = max_queue_s * 1000.0
        self._clock = clock
        self._pace = Pace(clock)
        self._refused: dict[str, _Refused] = {}  # key: the client
        self._refused_once = _NOTHING_REFUSED  # the refused work of all clients, counting one request of each
        self._batch_share = batch_share
        self._work_ms: dict[Priority, dict[int, float]] = {"interactive": {}, "batch": {}}
        self._clients: dict[int, str] = {}  # the client of each request id
        self._lock = threading.RLock()

    @property
    def backlog_ms(self) -> float:
        """The predicted device time of all accepted, unfinished requests, in milliseconds."""
        with self._lock:
            return sum(map(self._sum_ms, self._work_ms))

    def check(self, priority: Priority = "interactive", *, client: str = "") -> None:
        """Raise OverloadedError if even the shortest request of this client would be refused now.

        The error contains the time until a request may be accepted. An empty `client` means an anonymous client, which
        may fill the whole queue.
        """
        self._require_room(priority, client, work_ms=0.0)

    def admit(self, request_id: int, work_ms: float, *, priority: Priority = "interactive", client: str = "") -> None:
        """Count a request's work as accepted. Raises OverloadedError if the work does not fit into the queue."""
        with self._lock:
            self._require_room(priority, client, work_ms=work_ms)
            self._work_ms[priority][request_id] = work_ms
            self._clients[request_id] = client
            self._update_pace(done_ms=0.0)

    def _require_room(self, priority: Priority, client: str, *, work_ms: float) -> None:
        """Raise OverloadedError if the queue or this client's share of the queue has no room for the work.

        The limit per client does not apply to anonymous clients, nor to a client without accepted work.
        """
        max_ms = self._max_ms
        with self._lock:
            ahead_ms, pace = self._ahead(priority)
            held_ms = self._held_ms(priority) if client else {}
            work_ms *= self._pace.value
        own_ms = held_ms.get(client, 0.0)
        over_own_ms = own_ms + work_ms - _CLIENT_SHARE * max_ms if own_ms else 0.0
        over_ms = ahead_ms - max_ms
        if over_ms > 0 and client:
            less_ms = sum(each for each in held_ms.values() if each <= own_ms + work_ms)
            over_ms = min(over_ms, less_ms - _RESERVE_SHARE * max_ms)
        full_ms = max(over_ms, over_own_ms)
        if full_ms > 0:
            work_ms = work_ms or ahead_ms / max(self._num_held, 1)
            refused_ms = self._count_refused(client, work_ms)
            what = "the model's queue" if over_ms > 0 else "this client's share of the model's queue"
            raise OverloadedError(
                f"{what} is full (max_queue_s): about {pace * ahead_ms / 1000.0:.1f} s of work is waiting",
                retry_after_s=max(pace * (full_ms + refused_ms) / 1000.0, _LEAST_RETRY_S),
                full_for_s=pace * full_ms / 1000.0,
                work_s=pace * work_ms / 1000.0,
            )

    def _count_refused(self, client: str, work_ms: float) -> float:
        """Remember the work of a refused request, because its client is expected to send the request again.

        Returns the work of earlier refused requests in ms, which is added to this client's retry time. All earlier
        requests of this client count, but only one request of each other client. A client that ignores Retry-After
        therefore delays only itself. Remembered work shrinks as time passes.
        """
        if not client:
            return 0.0
        now = self._clock.monotonic()
        with self._lock:
            if len(self._refused) >= _MOST_CLIENTS:
                self._refused = {name: each for name, each in self._refused.items() if each.left_ms(now) > 0}
            own_ms = self._refused.get(client, _NOTHING_REFUSED).left_ms(now)
            all_ms = self._refused_once.left_ms(now)
            if client in self._refused or len(self._refused) < _MOST_CLIENTS:
                self._refused[client] = _Refused(min(own_ms + work_ms, _MOST_REFUSED_MS), now)
                if own_ms == 0.0:
                    self._refused_once = _Refused(min(all_ms + work_ms, _MOST_REFUSED_MS), now)
        return max(own_ms, all_ms)

    def _held_ms(self, priority: Priority) -> Mapping[str, float]:
        """Return each client's accepted work in ms, corrected by the current ratio of measured to predicted time.

        For an interactive request only interactive work counts.
        """
        works = [self._work_ms["interactive"]]
        if priority == "batch":
            works.append(self._work_ms["batch"])
        held: defaultdict[str, float] = defaultdict(float)
        for request_id, work_ms in chain.from_iterable(each.items() for each in works):
            held[self._clients[request_id]] += work_ms * self._pace.value
        return held

    def _ahead(self, priority: Priority) -> tuple[float, float]:
        """Return (the accepted work ahead of a request of this priority, a slowdown factor).

        The work is in ms, corrected by the current ratio of measured to predicted time. The factor is how much longer
        this work takes because batch work runs meanwhile; at least 1.
        """
        ahead_ms = self._sum_ms("interactive")
        is_shared = priority == "interactive" and bool(self._work_ms["batch"])
        if priority == "batch":
            ahead_ms += self._sum_ms("batch")
        return ahead_ms * self._pace.value, 1.0 + self._batch_share if is_shared else 1.0

    def update(self, request_id: int, work_ms: float) -> None:
        """Set the remaining work of an admitted request."""
        with self._lock:
            for works in self._work_ms.values():
                if request_id in works:
                    done_ms = works[request_id] - work_ms
                    works[request_id] = work_ms
                    self._update_pace(done_ms=done_ms)

    def release(self, request_id: int, *, is_done: bool = False) -> None:
        """Remove a request that ended. Does nothing if it was already removed.

        `is_done` says whether all of its work was finished.
        """
        with self._lock:
            self._clients.pop(request_id, None)
            for works in self._work_ms.values():
                if (left_ms := works.pop(request_id, None)) is not None:
                    self._update_pace(done_ms=left_ms if is_done else 0.0)

    def _update_pace(self, *, done_ms: float) -> None:
        is_deep = len(self._work_ms["interactive"]) >= _MANY and self._sum_ms("interactive") > self._max_ms / 2
        self._pace.record(done_ms=done_ms, is_deep=is_deep)

    @property
    def _num_held(self) -> int:
        return sum(map(len, self._work_ms.values()))

    def _sum_ms(self, priority: Priority) -> float:
        return sum(self._work_ms[priority].values())
