"""Settings that operators change while a server runs: draining, and the models to keep loaded.

The job database stores the settings of each server that uses it. Every process of a server reads its settings twice a
second. While the database is unavailable, the process uses the values that it read last.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

import sqlalchemy as sa

from stable_audio_serve.core.errors import StorageError
from stable_audio_serve.jobs.store.database import Database
from stable_audio_serve.jobs.store.tables import OPERATOR_SETTINGS

log = logging.getLogger(__name__)

_READ_EVERY_S = 0.5  # seconds between two reads of the settings
_RETRY_S = 3.0  # seconds between two reads while the database is unavailable; longer, because each failure is logged
_DRAINED, _KEPT = "drained", "kept"

_settings = OPERATOR_SETTINGS.c


@dataclass(frozen=True, slots=True)
class OperatorSettings:
    """What operators have set for one server.

    If `is_drained` is true, the server accepts no new work. `kept_models` has the canonical names of the models to keep
    loaded.
    """

    is_drained: bool = False
    kept_models: frozenset[str] = frozenset()


class OperatorStore:
    """Reads and changes the operators' settings of one server.

    The methods block, except `current` and `follow`, so call them from worker threads.
    """

    def __init__(self, database: Database, server: str) -> None:
        """The constructor makes no query. `server` is the name of the server in the job database."""
        self._database = database
        self._server = server
        self._current = OperatorSettings()

    @property
    def current(self) -> OperatorSettings:
        """The settings that were read last. Before the first read, the defaults."""
        return self._current

    def read(self) -> OperatorSettings:
        """Read the settings from the database and return them. Raises StorageError."""
        query = sa.select(_settings.setting, _settings.model).where(_settings.server == self._server)
        with self._database.reading() as connection:
            rows = connection.execute(query).all()
        kept = frozenset(row.model for row in rows if row.setting == _KEPT)
        self._current = OperatorSettings(any(row.setting == _DRAINED for row in rows), kept)
        return self._current

    async def follow(self, apply: Callable[[OperatorSettings], None]) -> None:
        """Read the settings twice a second and pass them to `apply`, until the task is cancelled."""
        while True:
            try:
                apply(await asyncio.to_thread(self.read))
            except StorageError:
                await asyncio.sleep(_RETRY_S)
            except Exception:  # one failed read must not end the task
                log.exception("the operators' settings could not be applied")
                await asyncio.sleep(_RETRY_S)
            else:
                await asyncio.sleep(_READ_EVERY_S)

    def drain(self) -> None:
        """Let the processes of this server accept no new work until `resume` is called. Raises StorageError."""
        self._set(_DRAINED)

    def resume(self) -> None:
        """Let the processes of this server accept new work again. Raises StorageError."""
        self._unset(_DRAINED)

    def keep(self, model: str) -> None:
        """Keep at least one replica of the model until `release` is called. Raises StorageError."""
        self._set(_KEPT, model)

    def release(self, model: str) -> None:
        """Let the model scale down to its configured minimum again. Raises StorageError."""
        self._unset(_KEPT, model)

    def _set(self, setting: str, model: str = "") -> None:
        insert = self._database.insert(OPERATOR_SETTINGS)
        with self._database.writing() as connection:
            values = insert.values(server=self._server, setting=setting, model=model)
            connection.execute(values.on_conflict_do_nothing())
        self.read()

    def _unset(self, setting: str, model: str = "") -> None:
        which = (_settings.server == self._server, _settings.setting == setting, _settings.model == model)
        with self._database.writing() as connection:
            connection.execute(sa.delete(OPERATOR_SETTINGS).where(*which))
        self.read()
