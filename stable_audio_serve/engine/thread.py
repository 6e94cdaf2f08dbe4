"""Runs the engine thread: warm-up, then turns until stopped. When the thread ends, all unfinished requests fail."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from stable_audio_serve.core.clock import Clock
from stable_audio_serve.engine.calls.request_state import Inbox
from stable_audio_serve.engine.loop import EngineLoop

log = logging.getLogger(__name__)

_IDLE_BEAT_S = 0.5


@dataclass(frozen=True, slots=True)
class EngineHeartbeat:
    """Whether the engine thread is alive, and how many seconds ago its last turn began (`age_s`)."""

    is_alive: bool
    age_s: float


class EngineThread:
    """Runs `prepare`, then the loop's turns. A thread that has ended is never restarted."""

    def __init__(
        self,
        loop: EngineLoop,
        inbox: Inbox,
        *,
        sharing: AbstractContextManager[object],
        prepare: Callable[[], None],
        clock: Clock,
    ) -> None:
        """All work runs within the `sharing` context manager, which sets the CPU thread count of each operation."""
        self._loop = loop
        self._inbox = inbox
        self._sharing = sharing
        self._prepare = prepare
        self._clock = clock
        self._beat_at = clock.monotonic()
        self.busy_s = 0.0  # seconds spent in turns that did work
        self._stopping = False
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.error: BaseException | None = None  # the error that ended the thread, if any

    def start(self) -> None:
        self._thread.start()

    def wait_ready(self) -> None:
        """Block until `prepare` has succeeded or the thread has ended."""
        self._ready.wait()

    def stop(self, *, timeout_s: float) -> None:
        """End the thread after its current turn and wait for it, at most `timeout_s` seconds.

        Unfinished requests fail with ModelUnavailableError.
        """
        self._stopping = True
        self._inbox.wake()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)

    def heartbeat(self) -> EngineHeartbeat:
        """Return whether the thread is alive and the age of its last turn."""
        return EngineHeartbeat(self._thread.is_alive(), self._clock.monotonic() - self._beat_at)

    def _run(self) -> None:
        try:
            with torch.inference_mode(), self._sharing:
                self._prepare()
                self._ready.set()
                while not self._stopping:
                    self._beat_at = self._clock.monotonic()
                    if self._loop.turn():
                        self.busy_s += self._clock.monotonic() - self._beat_at
                    else:
                        self._inbox.wait(_IDLE_BEAT_S)
        except BaseException as error:
            log.critical("the engine thread ended", exc_info=error)
            self.error = error
        finally:
            self._loop.abort()
            self._ready.set()
