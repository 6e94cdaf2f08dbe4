"""Short notes of operators that every process of an application must see: names under a heading, in the store of Ray's
head (GCS).

They outlive replicas and the controller, and the head where it has Redis behind it. Knows not what they mean, and
imports nothing heavy: the controller reads them.
"""

from __future__ import annotations

import logging
import threading
import time

from ray.exceptions import RpcError

from stable_audio_serve.core.errors import StorageError
from stable_audio_serve.serving.ray_internals import gcs_client

logger = logging.getLogger(__name__)

_NAMESPACE = b"stable-audio-serve"
_TIMEOUT_S = 2.0
_LOOK_S = 0.5


def note(heading: str, name: str, *, application: str) -> None:
    """Add a name, if it is not there. Blocking, two seconds at most. Raises StorageError."""
    _call("internal_kv_put", _key(heading, name, application=application), b"", True)


def erase(heading: str, name: str, *, application: str) -> None:
    """Remove a name, if it is there. Blocking, two seconds at most. Raises StorageError."""
    _call("internal_kv_del", _key(heading, name, application=application), False)


def read(heading: str, *, application: str) -> frozenset[str]:
    """Returns the names under a heading. Blocking, two seconds at most. Raises StorageError."""
    prefix = _key(heading, "", application=application)
    keys: list[bytes] = _call("internal_kv_keys", prefix)
    return frozenset(key.removeprefix(prefix).decode() for key in keys)


def watched(heading: str, *, application: str) -> frozenset[str] | None:
    """Returns `read` as a thread of this process read it, half a second ago; for code that may not wait.

    None before the first reading, a moment after the first call; while the head is away, the names before.
    """
    key = (heading, application)
    with _lock:
        if key not in _watches:
            _watches[key] = _Watch(heading, application=application)
    return _watches[key].names


class _Watch:
    """Reads again and again, for the life of the process."""

    def __init__(self, heading: str, *, application: str) -> None:
        self.names: frozenset[str] | None = None
        self._heading = heading
        self._application = application
        threading.Thread(target=self._run, daemon=True, name=f"notes-{heading}").start()

    def _run(self) -> None:
        while True:
            try:
                self.names = read(self._heading, application=self._application)
            except StorageError as error:
                logger.debug("%s", error)
            time.sleep(_LOOK_S)


_watches: dict[tuple[str, str], _Watch] = {}
_lock = threading.Lock()


def _key(heading: str, name: str, *, application: str) -> bytes:
    return f"{heading}/{application}/{name}".encode()


def _call(method: str, *arguments: object) -> list[bytes]:
    """One call of Ray's store: its answer is of no use but for the list of keys."""
    client = gcs_client()
    if client is None:
        raise StorageError("this process has no connection to Ray")
    try:
        return getattr(client, method)(*arguments, _NAMESPACE, timeout=_TIMEOUT_S)
    except RpcError as error:
        raise StorageError("Ray's head does not answer") from error
