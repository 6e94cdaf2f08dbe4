"""The queue in which event loops pass requests to the engine thread. Thread-safe; knows nothing of rows."""

from __future__ import annotations

import threading
from collections import deque

from stable_audio_serve.core.errors import ModelUnavailableError
from stable_audio_serve.engine.request_state import RequestState

UNAVAILABLE = "the model is shutting down or its engine stopped; retry"


class Inbox:
    """Submitted requests in order. A closed inbox accepts nothing, so no request can be left in it."""

    def __init__(self) -> None:
        self._requests: deque[RequestState] = deque()
        self._lock = threading.Lock()
        self._changed = threading.Event()
        self._closed = False

    def put(self, request: RequestState) -> None:
        """Add a request. Raises ModelUnavailableError once the inbox is closed."""
        with self._lock:
            if self._closed:
                raise ModelUnavailableError(UNAVAILABLE)
            self._requests.append(request)
        self._changed.set()

    def wake(self) -> None:
        """Wake the engine thread: something was cancelled, or it should stop."""
        self._changed.set()

    def wait(self, timeout_s: float) -> None:
        """Block until something arrives or `wake` is called, at most `timeout_s`."""
        self._changed.wait(timeout_s)

    def take(self) -> list[RequestState]:
        """Returns everything submitted since the last call."""
        self._changed.clear()
        with self._lock:
            taken = list(self._requests)
            self._requests.clear()
        return taken

    def close(self) -> list[RequestState]:
        """Accept nothing more. Returns the requests that were never taken."""
        with self._lock:
            self._closed = True
        return self.take()
