"""However many jobs are queued, a client's first job waits for at most one job of each other client."""

from __future__ import annotations

import pytest

from stable_audio_serve.core.settings import JobSettings
from stable_audio_serve.jobs.store.database import Database
from stable_audio_serve.jobs.store.job_store import JobStore
from tests.jobs.conftest import make_spec
from tests.jobs.stores import Wall, add_spec, database, fill, lease, postgres_with_tables, store_url, wall
from tests.parameters import some

__all__ = ["database", "postgres_with_tables", "store_url", "wall"]

_CLIENTS = [f"client {number}" for number in range(10)]


@pytest.mark.parametrize("num_started", some([1, 7, 25], [7]))
def test_new_client_starts_within_ten_jobs_behind_ten_thousand(database: Database, num_started: int) -> None:
    store = JobStore(database, JobSettings(max_queued=10_000))
    for client in _CLIENTS:
        fill(store, 1000, state="queued", client=client)
    for _ in range(num_started):
        lease(store)
    fill(store, num_started, state="queued", client=_CLIENTS[0])
    assert sum(store.runners.outlook("").queued.values()) == 10_000
    # The queue is full, but a client without waiting jobs may still add one.
    job = add_spec(store, make_spec(model="demo", client="another"))
    position = store.clients.position(job)
    started = [lease(store).spec for _ in range(10)]
    assert started.index(job.spec) == position < 10
    before = [spec.client for spec in started[:position]]
    assert len(before) == len(set(before))


def test_turns_are_even_for_queues_of_any_length(database: Database) -> None:
    store = JobStore(database, JobSettings(max_queued=10_000))
    for number, client in enumerate(_CLIENTS):
        fill(store, 10 + 50 * number, state="queued", client=client)
    started = [lease(store).spec.client for _ in range(50)]
    assert {client: started.count(client) for client in _CLIENTS} == dict.fromkeys(_CLIENTS, 5)


def test_jobs_of_unknown_models_are_left_to_other_servers_for_an_hour(database: Database, wall: Wall) -> None:
    store = JobStore(database, JobSettings())
    add_spec(store, make_spec(model="theirs", client="a"))
    own = add_spec(store, make_spec(model="ours", client="b"))

    def lease_known() -> str | None:
        job = store.runners.lease("runner", lease_s=60, known=["ours"])
        return None if job is None else job.spec.model

    assert [lease_known(), lease_known()] == [own.spec.model, None]
    wall.now += 3601
    assert lease_known() == "theirs"


def test_refused_clients_are_left_out_of_one_model(database: Database) -> None:
    store = JobStore(database, JobSettings())
    clients = ["a", "b\0é", "", "c"]
    for model in ("x", "y"):
        for client in clients:
            add_spec(store, make_spec(model=model, client=client))
    without = [("x", client) for client in clients[:3]]
    started = []
    while job := store.runners.lease("runner", lease_s=60, without=without):
        started.append((job.spec.model, job.spec.client))
    assert len(started) == 5
    assert {client for model, client in started if model == "x"} == {"c"}
