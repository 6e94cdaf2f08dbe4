"""The valid API keys: the keys in the settings, and the keys in a file that is read again when it changes.

A change is detected by the file's content, not by its date: Kubernetes replaces symbolic links to update a mounted
secret, and two versions of the file may have the same date. If the file cannot be used, the previous keys stay valid,
and the log, `/health` and a metric report the problem.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import structlog

from stable_audio_serve.core.cached_query import CachedQuery
from stable_audio_serve.core.clock import Clock
from stable_audio_serve.core.errors import ConfigError
from stable_audio_serve.core.keys import ApiKey, merge_keys, parse_key_file, parse_key_hash, read_key_file
from stable_audio_serve.core.metrics import Metrics, NullMetrics
from stable_audio_serve.core.settings import ApiSettings

log = structlog.get_logger("stable_audio_serve.api")

_LOOK_EVERY_S = 1.0
_PATIENCE_S = 0.5  # a request waits this long for a check of the file, and then uses the keys of the last check
_SILENT_AFTER_S = 10.0

KeyFileState = Literal["unset", "ok", "broken", "unread"]


@dataclass(frozen=True, slots=True)
class KeyFileHealth:
    """The state of the key file.

    `state` is `broken` if the file cannot be used now; the keys that were read before stay valid. `state` is `unread`
    if the file could never be read, so that its keys are unknown. `reason` is a sentence that does not quote the file.
    """

    state: KeyFileState = "unset"
    reason: str | None = None


def check_key_file(path: str | None) -> None:
    """Raise ConfigError if the key file cannot be used."""
    if path is None:
        return
    try:
        parse_key_file(read_key_file(path))
    except (OSError, ValueError) as error:
        message = f"api.key_file (STABLE_AUDIO_API_KEY_FILE): {path}: {_sentence(error)}"
        raise ConfigError(message, field="api.key_file") from error


class KeyRing:
    """The valid keys of one application. Use it on one event loop at a time."""

    def __init__(self, settings: ApiSettings, *, metrics: Metrics | None = None, clock: Clock | None = None) -> None:
        self._configured = [parse_key_hash(text) for text in settings.key_hashes]
        self._path = settings.key_file
        self._metrics = metrics or NullMetrics()
        self._data: bytes | None = None
        self.keys: Mapping[str, ApiKey] = merge_keys(self._configured, ())
        self._known = KeyFileHealth("unset" if self._path is None else "unread")
        self._check: CachedQuery[None] | None = None
        if self._path is not None:
            look = partial(self._look, self._path)
            look()
            self._check = CachedQuery(
                lambda: asyncio.to_thread(look), first=None, fresh_s=_LOOK_EVERY_S, timeout_s=_PATIENCE_S, clock=clock
            )

    @property
    def is_open(self) -> bool:
        """Whether no keys are configured, so that every client may use the API."""
        return self._path is None and not self._configured

    @property
    def health(self) -> KeyFileHealth:
        """The state of the file at the last check."""
        if self._check is not None and self._check.running_s > _SILENT_AFTER_S:
            return KeyFileHealth(self._bad_state, "the file does not answer")
        return self._known

    async def refresh(self) -> None:
        """Check the file for changes if the last check was at least a second ago.

        Waits at most half a second. A longer check continues in the background.
        """
        if self._check is not None:
            await self._check.refresh()

    @property
    def _bad_state(self) -> KeyFileState:
        return "unread" if self._data is None else "broken"

    def _look(self, path: str) -> None:
        """Read the file, and load its keys if it has changed. An invalid file is parsed at every check."""
        try:
            data = read_key_file(path)
            if data != self._data or self._known.state != "ok":
                self._take(data)
        except (OSError, ValueError) as error:
            found = KeyFileHealth(self._bad_state, _sentence(error))
            if found != self._known:
                log.error("the key file cannot be used; the previous keys stay valid", reason=found.reason)
        else:
            found = KeyFileHealth("ok")
        self._known = found
        self._metrics.gauge("key_file_broken", float(found.state != "ok"))

    def _take(self, data: bytes) -> None:
        before, self.keys = self.keys, merge_keys(self._configured, parse_key_file(data))
        num_added, num_removed = len(self.keys.keys() - before.keys()), len(before.keys() - self.keys.keys())
        self._data = data
        log.info("key file read", num_keys=len(self.keys), num_added=num_added, num_removed=num_removed)


def _sentence(error: OSError | ValueError) -> str:
    """Describe the error in one sentence, which the public route `/health` shows. It omits the file's path."""
    return f"it cannot be read: {error.strerror}" if isinstance(error, OSError) else str(error)
