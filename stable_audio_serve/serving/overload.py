"""Refusals by the ingress itself while a model is full, so that its replicas hear of few of them, and the times at
which refused clients are told to come again, each its own. Knows neither Ray nor HTTP. The engine's admission is the
truth: what a replica said counts for a second at most.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from dataclasses import replace

from stable_audio_serve.core.clock import Clock, SystemClock
from stable_audio_serve.core.errors import OverloadedError, QueueFullError
from stable_audio_serve.core.generation import GenerationRequest

_HOLD_S = 1.0  # a cancelled request or a new replica may make room sooner than a full one thought
_MAX_PROMISES = 10_000
_LONGEST_WAIT_S = 600.0
_GRACE_S = 5.0  # after its time a client is waited for: header fields carry whole seconds, and clients are not exact
_PROMISED_SHARE = 0.9  # of what is done is promised, so that delays do not add up
_CALM_S = 3.0  # without a refusal: the next overload may be by others, and those promised anything find room
_RETURN_WEIGHT = 0.02  # of one refused client on what is known of how many come again
_RATE_WINDOW_S = 2.0  # of a full model, at least, between two looks at how much was done
_RATE_WINDOW_NUM = 20  # requests, at least
_RATE_WEIGHT = 0.3
_LEAST_RATE = 0.001
_LEAST_AHEAD_S = 0.1
_LEAST_WAIT_S = 0.1
_FULL_S = 1.0  # since the last refusal: then a model still counts as full


class Promises:
    """How many were told to come, and when. Clients are known by what they ask for; those with the same wish may take
    each other's places.
    """

    def __init__(self) -> None:
        self._dues: defaultdict[int, list[float]] = defaultdict(list)  # by wish; heaps
        self._order: list[tuple[float, int]] = []  # a heap of all of them, and of some that have come
        self._return_share = 1.0
        self._num_open = 0

    @property
    def num_expected(self) -> float:
        """How many of them will come, if as many do as did lately."""
        return self._num_open * self._return_share

    def add(self, wish: int, *, due_at: float) -> None:
        """Note that a client was told to come at `due_at`; above some thousands nobody is noted."""
        if self._num_open < _MAX_PROMISES:
            heapq.heappush(self._dues[wish], due_at)
            heapq.heappush(self._order, (due_at, wish))
            self._num_open += 1

    def claim(self, wish: int, *, now: float) -> bool:
        """Returns whether a client with this wish was told to come now or shortly before. It has come then."""
        if wish not in self._dues or self._dues[wish][0] > now:
            return False
        self._close(wish, has_come=True)
        return True

    def forget_late(self, now: float) -> None:
        """Stop waiting for those who did not come."""
        while self._order and self._order[0][0] < now - _GRACE_S:
            due_at, wish = heapq.heappop(self._order)
            if wish in self._dues and self._dues[wish][0] <= due_at:
                self._close(wish, has_come=False)

    def _close(self, wish: int, *, has_come: bool) -> None:
        heapq.heappop(self._dues[wish])
        if not self._dues[wish]:
            del self._dues[wish]
        self._num_open -= 1
        self._return_share += _RETURN_WEIGHT * (has_come - self._return_share)


class _Rate:
    """How many requests of this process are done in a second while the model is full."""

    def __init__(self) -> None:
        self._measured_per_s: float | None = None
        self._guessed_per_s = 1.0
        self._since = float("-inf")
        self._full_until = float("-inf")
        self._num_done = 0

    @property
    def per_s(self) -> float:
        """What was measured, else the guess."""
        per_s = self._guessed_per_s if self._measured_per_s is None else self._measured_per_s
        return max(per_s, _LEAST_RATE)

    def guess(self, per_s: float) -> None:
        """Say what it may be while nothing is measured."""
        self._guessed_per_s = per_s

    def is_full(self, now: float) -> None:
        """Note that the model is full now."""
        if now > self._full_until:
            self._since, self._num_done = now, 0
        self._full_until = now + _FULL_S
        if now - self._since >= _RATE_WINDOW_S and self._num_done >= _RATE_WINDOW_NUM:
            newest = self._num_done / (now - self._since)
            before = newest if self._measured_per_s is None else self._measured_per_s
            self._measured_per_s = before + _RATE_WEIGHT * (newest - before)
            self._since, self._num_done = now, 0

    def done(self) -> None:
        """Note that a request has its audio."""
        self._num_done += 1


class OverloadGuard:
    """One model, as seen by one process that calls it. Used on one event loop."""

    def __init__(self, clock: Clock = SystemClock()) -> None:
        self._clock = clock
        self._promises = Promises()
        self._rate = _Rate()
        self._room_at = float("-inf")  # when a replica that was full thought to have room
        self._held_until = float("-inf")
        self._refused_at = float("-inf")
        self._second_try_at = float("-inf")  # of the last one who came as told and found no room

    def enter(self, request: GenerationRequest) -> GenerationRequest:
        """Returns the request as it is to be passed on. Raises OverloadedError."""
        now = self._clock.monotonic()
        self._promises.forget_late(now)
        is_promised = self._promises.claim(_wish(request), now=now)
        if not is_promised and now < self._held_until:
            raise self._refusal(request, wait_s=self._room_at - now, now=now)
        return replace(request, is_promised=is_promised)

    def done(self) -> None:
        """Note that a request that entered has its audio."""
        self._rate.done()

    def refuse(self, request: GenerationRequest, error: QueueFullError) -> OverloadedError:
        """Note that a request that entered was refused. Returns what to tell its client."""
        now = self._clock.monotonic()
        wait_s = error.retry_after_s or 0.0
        self._room_at = now + wait_s
        self._held_until = now + min(wait_s, _HOLD_S)
        if error.num_ahead:
            self._rate.guess(error.num_ahead / max(error.ahead_s, _LEAST_AHEAD_S))
        return self._refusal(request, wait_s=wait_s, now=now)

    def _refusal(self, request: GenerationRequest, *, wait_s: float, now: float) -> OverloadedError:
        if now - self._refused_at > _CALM_S:
            self._promises = Promises()
        self._refused_at = now
        self._rate.is_full(now)
        if request.is_promised:  # it has waited its turn already
            due_at = max(now + wait_s, self._second_try_at + 1.0 / self._rate.per_s)
            self._second_try_at = due_at
        else:
            due_at = now + wait_s + self._promises.num_expected / (_PROMISED_SHARE * self._rate.per_s)
        wait_s = min(max(due_at - now, _LEAST_WAIT_S), _LONGEST_WAIT_S)
        self._promises.add(_wish(request), due_at=now + wait_s)
        message = f"the model's queue is full (max_queue_s); retry in {wait_s:.1f} s"
        return OverloadedError(message, retry_after_s=wait_s)


def _wish(request: GenerationRequest) -> int:
    """Returns a number that is the same when a client asks for the same again; the seed may be another one then."""
    return hash(
        (
            request.prompt,
            request.negative_prompt,
            request.duration_s,
            request.steps,
            request.batch_size,
            request.init_audio is None,
            request.inpaint_regions_s,
        )
    )
