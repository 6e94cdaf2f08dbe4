"""Where event loops hand requests to the engine thread, and what the thread tells about itself. Thread-safe."""

from __future__ import annotations

import threading
from collections import deque

from stable_audio_serve.core.errors import ModelUnavailableError
from stable_audio_serve.engine.request_state import RequestState

UNAVAILABLE = "the model is shutting down or its engine stopped; retry"


class Inbox:
    """Submitted requests in order. Once closed nothing enters any more, so nothing can be forgotten in it."""

    def __init__(self) -> None:
        self._requests: deque[RequestState] = deque()
        self._lock = threading.Lock()
        self._changed = threading.Event()
        self._closed = False

    def put(self, request: RequestState) -> None:
        """Raises ModelUnavailableError once the inbox is closed."""
        with self._lock:
            if self._closed:
                raise ModelUnavailableError(UNAVAILABLE)
            self._requests.append(request)
        self._changed.set()

    def wake(self) -> None:
        """Make the engine thread look around: something was cancelled, or it should stop."""
        self._changed.set()

    def wait(self, timeout_s: float) -> None:
        """Sleep until something arrives or `wake` is called, at most `timeout_s`."""
        self._changed.wait(timeout_s)

    def take(self) -> list[RequestState]:
        """Everything submitted since the last call."""
        self._changed.clear()
        with self._lock:
            taken = list(self._requests)
            self._requests.clear()
        return taken

    def close(self) -> list[RequestState]:
        """Let nothing in any more; answers what was never taken."""
        with self._lock:
            self._closed = True
        return self.take()
