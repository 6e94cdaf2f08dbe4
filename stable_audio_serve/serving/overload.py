"""Refusals by the ingress itself while a model is full, so that its replicas hear of few of them, and the times at
which refused clients are told to come again, each its own. Knows neither Ray nor HTTP. The engine's admission is the
truth: what a replica said of a client counts for that client alone, for a second at most. Until then little more is
passed on than the model does. Of
several processes that call a model each tells the others whom it told to come, since a client may ask any of them the
next time, and how much it passed on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from stable_audio_serve.core.clock import Clock, SystemClock
from stable_audio_serve.core.errors import OverloadedError, QueueFullError
from stable_audio_serve.core.generation import GenerationRequest
from stable_audio_serve.serving.promises import Promises, wish_of

_HOLD_S = 1.0  # a cancelled request or a new replica may make room sooner than a full one thought
_LONGEST_WAIT_S = 600.0
_MOST_CLIENTS = 1000  # whose refusals are remembered, before those that are over are cleared away
_PASSED_SHARE = 1.25  # of what is done is passed on to a full model: a replica that did more would not be found out
_PROMISED_SHARE = 0.9  # of what is done is promised, so that delays do not add up
_CALM_S = 3.0  # without a refusal or one who comes as told: the next overload may be by others
_ON_THE_WAY_S = 0.3  # at most, of a word to another process: the time that it names is rather too early there
_RATE_WINDOW_S = 2.0  # of a full model, at least, between two looks at how much was done
_RATE_WINDOW_NUM = 20  # requests, at least
_RATE_WEIGHT = 0.3
_LEAST_RATE = 0.001
_LEAST_AHEAD_S = 0.1
_LEAST_WAIT_S = 0.1
_FULL_S = 1.0  # since the last refusal: then a model still counts as full


@dataclass(frozen=True, slots=True)
class Word:
    """What one process tells the others of one model since it did so last: who was told to come in how many seconds, by
    their wishes, who came, who need not come any more, and how many requests were done while the model was full.
    """

    promised: Sequence[tuple[int, float]] = ()
    came: Sequence[int] = ()
    withdrawn: Sequence[int] = ()
    num_entered: int = 0
    num_done: int = 0


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

    @property
    def is_known(self) -> bool:
        """Whether it was ever measured."""
        return self._measured_per_s is not None

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

    def is_measured(self, now: float) -> bool:
        """Whether what is done now counts."""
        return now <= self._full_until

    def done(self, number: int = 1) -> None:
        """Note that requests have their audio."""
        self._num_done += number


@dataclass(slots=True)
class _News:
    """What the other processes have not been told yet."""

    promised: list[tuple[int, float]] = field(default_factory=list)  # wishes, and when in the time of this process
    came: list[int] = field(default_factory=list)
    withdrawn: list[int] = field(default_factory=list)
    num_entered: int = 0
    num_done: int = 0


class OverloadGuard:
    """One model, as seen by one process that calls it. Used on one event loop."""

    def __init__(self, clock: Clock = SystemClock(), *, num_processes: int = 1) -> None:
        """`num_processes` call this model; where there are several, `tell` must be called again and again."""
        self._clock = clock
        self._num_processes = num_processes
        self._promises = Promises()
        self._news = _News()
        self._rate = _Rate()
        self._room_at = float("-inf")  # when there is thought to be room for the next one
        self._trusted_until = float("-inf")  # what a full replica said
        self._refused_until: dict[str, float] = {}  # by client: when the replica is asked again for it
        self._calm_at = float("-inf")
        self._second_try_at = float("-inf")  # of the last one who came as told and found no room

    def enter(self, request: GenerationRequest) -> GenerationRequest:
        """Returns the request as it is to be passed on. Raises OverloadedError."""
        now = self._clock.monotonic()
        self._promises.forget_late(now)
        is_promised = bool(self._promises.num_open) and self._claim(wish_of(request), now)
        if not is_promised and now < min(self._room_at, self._refused_until.get(request.client, 0.0)):
            raise self._refusal(request, wait_s=self._room_at - now, now=now)
        self._take_room(now)
        self._news.num_entered += now < self._trusted_until
        return replace(request, is_promised=is_promised)

    def done(self) -> None:
        """Note that a request that entered has its audio."""
        self._rate.done()
        self._news.num_done += 1

    def refuse(self, request: GenerationRequest, error: QueueFullError) -> OverloadedError:
        """Note that a request that entered was refused. Returns what to tell its client."""
        now = self._clock.monotonic()
        wait_s = error.retry_after_s or 0.0
        self._room_at = now + wait_s
        self._trusted_until = now + _HOLD_S
        if len(self._refused_until) >= _MOST_CLIENTS:
            self._refused_until = {name: until for name, until in self._refused_until.items() if until > now}
        self._refused_until[request.client] = now + _HOLD_S
        if error.num_ahead:
            self._rate.guess(error.num_ahead / max(error.ahead_s, _LEAST_AHEAD_S))
        return self._refusal(request, wait_s=wait_s, now=now)

    def promise(self, request: GenerationRequest, *, in_s: float) -> None:
        """Note that the client is told to come after so many seconds; a refusal says so by itself."""
        wish, due_at = wish_of(request), self._clock.monotonic() + in_s
        if self._promises.add(wish, due_at=due_at) and self._is_one_of_many:
            self._news.promised.append((wish, due_at))

    def withdraw(self, request: GenerationRequest) -> None:
        """Note that the client is not told to come after all."""
        wish = wish_of(request)
        if self._promises.withdraw(wish) and self._is_one_of_many:
            self._news.withdrawn.append(wish)

    def tell(self) -> Word | None:
        """Returns what the other processes have to hear now, None where that is nothing."""
        now = self._clock.monotonic()
        news, self._news = self._news, _News()
        is_silent = not (news.promised or news.came or news.withdrawn or news.num_entered)
        if is_silent and not (news.num_done and self._rate.is_measured(now)):
            return None
        promised = [(wish, due_at - now) for wish, due_at in news.promised]
        return Word(promised, news.came, news.withdrawn, news.num_entered, news.num_done)

    def hear(self, word: Word) -> None:
        """Note what another process told."""
        now = self._clock.monotonic()
        if word.promised:
            self._note_refusal(now)
        for wish, in_s in word.promised:
            self._promises.add(wish, due_at=now + in_s - _ON_THE_WAY_S)
        for wish in word.came:
            self._promises.claim(wish)
        self._take_room(now, word.num_entered)
        for wish in word.withdrawn:
            self._promises.withdraw(wish)
        self._rate.done(word.num_done)

    def _take_room(self, now: float, number: int = 1) -> None:
        """Leave the next room of a full model to those who go there now."""
        if now < self._trusted_until and self._rate.is_known:
            self._room_at = max(self._room_at, now) + number / (_PASSED_SHARE * self._rate.per_s)

    @property
    def _is_one_of_many(self) -> bool:
        return self._num_processes > 1

    def _claim(self, wish: int, now: float) -> bool:
        has_come = self._promises.claim(wish, now=now)
        if has_come:
            self._calm_at = now + _CALM_S
            if self._is_one_of_many:
                self._news.came.append(wish)
        return has_come

    def _refusal(self, request: GenerationRequest, *, wait_s: float, now: float) -> OverloadedError:
        self._note_refusal(now)
        if request.is_promised:  # it has waited its turn already
            due_at = max(now + wait_s, self._second_try_at + self._num_processes / self._rate.per_s)
            self._second_try_at = due_at
        else:
            due_at = now + wait_s + self._num_expected() / (_PROMISED_SHARE * self._rate.per_s)
        wait_s = min(max(due_at - now, _LEAST_WAIT_S), _LONGEST_WAIT_S)
        self.promise(request, in_s=wait_s)
        message = f"the model's queue is full (max_queue_s); retry in {wait_s:.1f} s"
        return OverloadedError(message, retry_after_s=wait_s)

    def _note_refusal(self, now: float) -> None:
        if now > self._calm_at:
            self._promises = Promises()
        self._calm_at = now + _CALM_S
        self._rate.is_full(now)

    def _num_expected(self) -> float:
        """How many will come before the next one: the others promise as much as this process while nobody tells."""
        num_untold = (self._num_processes - 1) * len(self._news.promised)
        return (self._promises.num_open + num_untold) * self._promises.return_share
