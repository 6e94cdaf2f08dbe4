"""Runs the engine thread: warm-up, then turns until stopped. Every waiting request gets an answer when it ends."""

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
    """Whether the engine thread is alive, and `age_s`, the time since its last turn began."""

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
        """All work runs within the `sharing` context, which sets the thread count of each operation."""
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
        """Block until the preparation succeeded or the thread ended."""
        self._ready.wait()

    def stop(self, *, timeout_s: float) -> None:
        """End after the current turn and fail unfinished requests as unavailable. Waits at most `timeout_s`."""
        self._stopping = True
        self._inbox.wake()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)

    def heartbeat(self) -> EngineHeartbeat:
        """Returns whether the thread is alive and the age of its last turn."""
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
