"""Which models operators keep loaded: at least one replica each, whatever the load, until they let them go.

The names lie in the store of Ray's head (GCS), where all ingress replicas write and the autoscaling policy reads. They
outlive replicas and the controller, and the head where it has Redis behind it; a server that is started anew begins
with what its configuration says. Knows neither replicas nor policies, and imports nothing heavy for the controller.
"""

from __future__ import annotations

import logging
import threading
import time

from ray.exceptions import RpcError
from ray.experimental.internal_kv import internal_kv_get_gcs_client

from stable_audio_serve.core.errors import StorageError

logger = logging.getLogger(__name__)

_NAMESPACE = b"stable-audio-serve"
_TIMEOUT_S = 2.0
_LOOK_S = 0.5


def keep(model: str, *, application: str) -> None:
    """Keep one replica of the model until `release`. Blocking, two seconds at most. Raises StorageError."""
    _call("internal_kv_put", _key(application, model), b"", True)


def release(model: str, *, application: str) -> None:
    """Keep the model no longer. Blocking, two seconds at most. Raises StorageError."""
    _call("internal_kv_del", _key(application, model), False)


def read_kept(application: str) -> frozenset[str]:
    """Returns the names of the models that are kept. Blocking, two seconds at most. Raises StorageError."""
    prefix = _key(application, "")
    keys: list[bytes] = _call("internal_kv_keys", prefix)
    return frozenset(key.removeprefix(prefix).decode() for key in keys)


def kept(application: str) -> frozenset[str]:
    """Returns `read_kept` as a thread of this process read it, half a second ago; for code that may not wait.

    Before the first reading, a moment after the first call, nothing is kept; while the store is away, what was before.
    """
    with _lock:
        if application not in _watches:
            _watches[application] = _Watch(application)
    return _watches[application].models


class _Watch:
    """Reads again and again, for the life of the process."""

    def __init__(self, application: str) -> None:
        self.models: frozenset[str] = frozenset()
        self._application = application
        threading.Thread(target=self._run, daemon=True, name="kept-models").start()

    def _run(self) -> None:
        while True:
            try:
                self.models = read_kept(self._application)
            except StorageError as error:
                logger.debug("%s", error)
            time.sleep(_LOOK_S)


_watches: dict[str, _Watch] = {}
_lock = threading.Lock()


def _key(application: str, model: str) -> bytes:
    return f"kept/{application}/{model}".encode()


def _call(method: str, *arguments: object) -> list[bytes]:
    """One call of Ray's store: its answer is of no use but for the list of keys."""
    client = internal_kv_get_gcs_client()
    if client is None:
        raise StorageError("this process has no connection to Ray")
    try:
        return getattr(client, method)(*arguments, _NAMESPACE, timeout=_TIMEOUT_S)
    except RpcError as error:
        raise StorageError("Ray's head does not answer") from error
