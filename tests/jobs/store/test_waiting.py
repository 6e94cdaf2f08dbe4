"""The database adds up the work of all waiting jobs of each model. Tested with every kind of database."""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from stable_audio_serve.core.catalog import ModelCard, ModelCatalog
from stable_audio_serve.core.generation import GenerationRequest
from stable_audio_serve.core.pricing import WorkSize
from stable_audio_serve.core.settings import JobSettings
from stable_audio_serve.jobs.job import JobSpec
from stable_audio_serve.jobs.store.database import Database
from stable_audio_serve.jobs.store.job_store import JobStore
from stable_audio_serve.jobs.store.operator_jobs import Waiting
from stable_audio_serve.jobs.store.tables import JOBS
from tests.jobs.conftest import make_spec
from tests.jobs.stores import add_spec, database, lease, postgres_with_tables, wall
from tests.jobs.stores import contract_store_url as store_url

__all__ = ["database", "postgres_with_tables", "store_url", "wall"]

FLOW = ModelCard("flow", "f", default_steps=8, default_cfg_scale=1.0)
GUIDED = ModelCard("guided", "f", default_steps=100, default_cfg_scale=7.0)


@pytest.fixture
def store(database: Database) -> JobStore:
    return JobStore(database, JobSettings(), catalog=ModelCatalog([FLOW, GUIDED]))


def spec(model: str, duration_s: float, **fields: object) -> JobSpec:
    return make_spec(
        model=model,
        request=GenerationRequest(prompt="x", duration_s=duration_s, seed=1, **fields),  # type: ignore[arg-type]
    )


def test_sizes_of_jobs_add_up_by_model(store: JobStore) -> None:
    add_spec(store, spec("flow", 4.0))  # 8 steps, each of which evaluates 4 s of audio
    add_spec(store, spec("flow", 10.0, batch_size=2, steps=20, cfg_scale=3.0))  # 2 clips x 20 steps x 2 (guidance)
    add_spec(store, spec("guided", 1.0))  # 100 steps x 2 (guidance)
    assert store.operators.waiting_work() == {
        "flow": Waiting(2, WorkSize(rows=3, evaluations=88, evaluated_s=832, audio_s=24)),
        "guided": Waiting(1, WorkSize(rows=1, evaluations=200, evaluated_s=200, audio_s=1)),
    }


def test_only_waiting_jobs_count(store: JobStore) -> None:
    for _ in range(3):
        add_spec(store, spec("flow", 4.0))
    assert store.operators.waiting_work()["flow"].num_jobs == 3
    job = lease(store)
    assert store.operators.waiting_work()["flow"].num_jobs == 2
    store.runners.requeue(job, delay_s=0, attempts=1, message="again")
    assert store.operators.waiting_work()["flow"].size.audio_s == 12
    for job in store.operators.list_all():
        store.clients.cancel(job.spec.ref)
    assert store.operators.waiting_work() == {}


def test_jobs_of_an_older_server_count_without_a_size(store: JobStore) -> None:
    job = add_spec(store, spec("flow", 4.0))
    older = {"work_rows": 0, "work_evaluations": 0, "work_evaluated_s": 0, "work_audio_s": 0}
    with store.database.writing() as connection:
        connection.execute(sa.update(JOBS).where(JOBS.c.id == job.spec.id).values(older))
    assert store.operators.waiting_work() == {"flow": Waiting(1, WorkSize())}
