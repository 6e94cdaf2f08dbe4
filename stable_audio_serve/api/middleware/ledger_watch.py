"""Whether the ledger of limits answers one process, and for how long an answer is waited for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import structlog

from stable_audio_serve.core.clock import Clock
from stable_audio_serve.core.errors import StorageError
from stable_audio_serve.core.metrics import Metrics

log = structlog.get_logger("stable_audio_serve.api")

RETRY_S = 1.0
SHORT_PATIENCE_S = 2.0


class LedgerWatch:
    """Sees every transaction of a process; belongs to one event loop."""

    def __init__(self, clock: Clock, *, metrics: Metrics, patience_s: float) -> None:
        """A ledger that was not away may be busy: it is waited for as long as `patience_s`, in seconds."""
        self._clock = clock
        self._metrics = metrics
        self._patience_s = patience_s
        self._began_at: float | None = None  # of the transaction in progress
        self._away_until = float("-inf")
        self._is_away = False

    @property
    def patience_s(self) -> float:
        """For how long an answer may be late now."""
        return min(self._patience_s, SHORT_PATIENCE_S) if self._is_away else self._patience_s

    @property
    def is_silent(self) -> bool:
        """Whether there is no use in waiting now."""
        now = self._clock.monotonic()
        return now < self._away_until or (self._began_at is not None and now - self._began_at > self.patience_s)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Holds one; after a StorageError nobody waits for the next before it is tried again, `RETRY_S` later."""
        self._began_at = self._clock.monotonic()
        try:
            yield
        except StorageError as error:
            self._away_until = self._clock.monotonic() + RETRY_S
            self._note(error.message)
            raise
        else:
            self._note(None)
        finally:
            self._began_at = None

    def give_up(self) -> None:
        """Somebody has waited in vain."""
        self._note("it has not answered for seconds")

    def _note(self, reason: str | None) -> None:
        if self._is_away is (reason is not None):
            return
        self._is_away = reason is not None
        self._metrics.gauge("key_limits_alone", float(self._is_away))
        if reason is not None:
            log.warning("the limits of keys are kept by each process alone", error=reason)
        else:
            log.info("the limits of keys are shared again")
