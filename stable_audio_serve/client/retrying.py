"""When a failed call is sent again, and after which pause. Knows no HTTP."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from stable_audio_serve.core.errors import (
    ModelUnavailableError,
    NotConnectedError,
    OverloadedError,
    StableAudioError,
    StoppingError,
    StorageError,
    StorageFullError,
    UnreachableError,
)

_PASSING = (OverloadedError, ModelUnavailableError, StoppingError, StorageError, UnreachableError)


@dataclass(frozen=True, slots=True)
class Retries:
    """How often and how long to try. `most_wait_s` bounds the pauses of one call together, seconds.

    A pause is as long as the server asks for with Retry-After, and a little longer, so that those who are refused
    together do not come back together; without Retry-After it doubles from `first_pause_s` on. `most_refused` bounds
    the attempts after connections that could not be made. `on_pause` is called before each pause, with the failure and
    the length of the pause in seconds.
    """

    most: int = 5
    most_wait_s: float = 120.0
    first_pause_s: float = 0.5
    most_refused: int | None = None
    on_pause: Callable[[StableAudioError, float], None] | None = None


class Attempts:
    """The attempts of one call."""

    def __init__(self, retries: Retries, *, jitter: Callable[[], float] = random.random) -> None:
        self._retries = retries
        self._jitter = jitter
        self._num_failed = 0
        self._waited_s = 0.0

    @property
    def are_several(self) -> bool:
        """Whether the last attempt had one before it, which the server may have heard."""
        return self._num_failed > 1

    def pause_s(self, failure: StableAudioError) -> float:
        """Returns how long to wait before the next attempt, seconds. Raises the failure if there is no next one."""
        doubling_s = self._retries.first_pause_s * 2.0**self._num_failed
        asked_s = failure.retry_after_s if failure.retry_after_s is not None else doubling_s / 2.0
        pause_s = asked_s + doubling_s / 2.0 * self._jitter()
        self._num_failed += 1
        passes = isinstance(failure, _PASSING) and not isinstance(failure, StorageFullError)
        if not passes or self._num_failed > self._most(failure):
            raise failure
        if self._waited_s + pause_s > self._retries.most_wait_s:
            raise failure
        self._waited_s += pause_s
        if self._retries.on_pause is not None:
            self._retries.on_pause(failure, pause_s)
        return pause_s

    def _most(self, failure: StableAudioError) -> int:
        most, refused = self._retries.most, self._retries.most_refused
        return most if refused is None or not isinstance(failure, NotConnectedError) else min(most, refused)
