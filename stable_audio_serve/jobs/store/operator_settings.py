"""What operators set while a server runs: that it takes no new work, and which models it keeps loaded.

Stored in the job database, separately for each server that shares it. Every process of a server reads it twice a
second; while the database does not answer, the last values hold.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import sqlalchemy as sa

from stable_audio_serve.core.errors import StorageError
from stable_audio_serve.jobs.store.database import Database
from stable_audio_serve.jobs.store.tables import OPERATOR_SETTINGS

_LOOK_S = 0.5  # between two readings
_AWAY_S = 3.0  # the same while the database does not answer, which each reading logs
_DRAINED, _KEPT = "drained", "kept"

_settings = OPERATOR_SETTINGS.c


@dataclass(frozen=True, slots=True)
class OperatorSettings:
    """For one server: whether it takes no new work, and the canonical names of the models that stay loaded."""

    is_drained: bool = False
    kept_models: frozenset[str] = frozenset()


class OperatorStore:
    """The settings of one server. Blocking, for worker threads, but for `current` and `follow`."""

    def __init__(self, database: Database, server: str) -> None:
        """Touches nothing yet. `server` is its name among the servers that share the database."""
        self._database = database
        self._server = server
        self._current = OperatorSettings()

    @property
    def current(self) -> OperatorSettings:
        """The last values read; before the first reading, nothing is set."""
        return self._current

    def read(self) -> OperatorSettings:
        """Returns the settings now. Raises StorageError."""
        query = sa.select(_settings.setting, _settings.model).where(_settings.server == self._server)
        with self._database.reading() as connection:
            rows = connection.execute(query).all()
        kept = frozenset(row.model for row in rows if row.setting == _KEPT)
        self._current = OperatorSettings(any(row.setting == _DRAINED for row in rows), kept)
        return self._current

    async def follow(self, apply: Callable[[OperatorSettings], None]) -> None:
        """Read twice a second and call `apply` with the settings, until cancelled."""
        while True:
            try:
                apply(await asyncio.to_thread(self.read))
            except StorageError:
                await asyncio.sleep(_AWAY_S)
            else:
                await asyncio.sleep(_LOOK_S)

    def drain(self) -> None:
        """Take no new work in any process of this server, until `resume`. Raises StorageError."""
        self._set(_DRAINED)

    def resume(self) -> None:
        """Take new work again. Raises StorageError."""
        self._unset(_DRAINED)

    def keep(self, model: str) -> None:
        """Keep one replica of the model, whatever the load, until `release`. Raises StorageError."""
        self._set(_KEPT, model)

    def release(self, model: str) -> None:
        """Keep the model no longer. Raises StorageError."""
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
