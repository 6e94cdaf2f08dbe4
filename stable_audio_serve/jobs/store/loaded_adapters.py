"""The adapters that operators loaded while a server ran. Unlike `operator_settings`, they are kept over restarts."""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa

from stable_audio_serve.jobs.store.database import Database
from stable_audio_serve.jobs.store.tables import LOADED_ADAPTERS

_adapters = LOADED_ADAPTERS.c


@dataclass(frozen=True, slots=True)
class LoadedAdapter:
    """An adapter of a model. `model` is the model's canonical name, `source` is where the adapter's file is.

    `generation.Lora` describes the values of `source`.
    """

    model: str
    name: str
    source: str


class AdapterStore:
    """Reads and changes the loaded adapters of one server. The methods block, so call them from worker threads."""

    def __init__(self, database: Database, server: str) -> None:
        """The constructor makes no query. `server` is the name of the application."""
        self._database = database
        self._server = server

    def read(self) -> tuple[LoadedAdapter, ...]:
        """Return the adapters in order of their models and names. Raises StorageError."""
        columns = (_adapters.model, _adapters.name, _adapters.source)
        query = sa.select(*columns).where(_adapters.server == self._server)
        with self._database.reading() as connection:
            rows = connection.execute(query).all()
        return tuple(sorted((LoadedAdapter(*row) for row in rows), key=lambda row: (row.model, row.name)))

    def add(self, adapter: LoadedAdapter) -> LoadedAdapter:
        """Add an adapter, unless the model has one of this name. Returns the stored adapter. Raises StorageError."""
        insert = self._database.insert(LOADED_ADAPTERS)
        values = {"server": self._server, "model": adapter.model, "name": adapter.name, "source": adapter.source}
        with self._database.writing() as connection:
            connection.execute(insert.values(values).on_conflict_do_nothing())
            query = sa.select(_adapters.source).where(*self._which(adapter.model, adapter.name))
            source: str = connection.execute(query).scalar_one()
        return LoadedAdapter(adapter.model, adapter.name, source)

    def remove(self, model: str, name: str) -> bool:
        """Remove an adapter. Returns False if there was none. Raises StorageError."""
        with self._database.writing() as connection:
            deleted = connection.execute(sa.delete(LOADED_ADAPTERS).where(*self._which(model, name)))
        return bool(deleted.rowcount)

    def _which(self, model: str, name: str) -> tuple[sa.ColumnElement[bool], ...]:
        return (_adapters.server == self._server, _adapters.model == model, _adapters.name == name)
