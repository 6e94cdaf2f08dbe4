"""Every process of a server reads the adapters that operators loaded, also after a restart."""

from __future__ import annotations

from stable_audio_serve.jobs.store.database import Database
from stable_audio_serve.jobs.store.loaded_adapters import AdapterStore, LoadedAdapter
from tests.jobs.stores import contract_store_url as store_url
from tests.jobs.stores import database, open_database, postgres_with_tables, wall

__all__ = ["database", "postgres_with_tables", "store_url", "wall"]

VINYL, BELLS = LoadedAdapter("medium", "vinyl", "/a/vinyl.safetensors"), LoadedAdapter("medium", "bells", "lab/bells")


def test_adapters_reach_every_process_of_one_server(database: Database, store_url: str) -> None:
    store, other = AdapterStore(database, "audio"), AdapterStore(database, "other")
    assert store.read() == ()
    assert (store.add(VINYL), store.add(BELLS)) == (VINYL, BELLS)
    elsewhere = open_database(store_url)
    assert AdapterStore(elsewhere, "audio").read() == (BELLS, VINYL)
    assert other.read() == ()
    elsewhere.close()


def test_the_first_adapter_of_a_name_stays(database: Database) -> None:
    store = AdapterStore(database, "audio")
    store.add(VINYL)
    assert store.add(LoadedAdapter("medium", "vinyl", "/b.safetensors")) == VINYL
    assert store.add(LoadedAdapter("small", "vinyl", "/b.safetensors")).source == "/b.safetensors"
    assert store.remove("medium", "vinyl")
    assert not store.remove("medium", "vinyl")
    assert [(one.model, one.name) for one in store.read()] == [("small", "vinyl")]
