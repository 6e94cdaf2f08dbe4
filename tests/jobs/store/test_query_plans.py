"""With 10,000 waiting and 10,000 ended jobs, no query of the job store scans or sorts a whole table."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa

from stable_audio_serve.core.settings import JobSettings
from stable_audio_serve.jobs.store.database import Database
from stable_audio_serve.jobs.store.job_store import JobStore
from stable_audio_serve.jobs.store.outbox import Outbox
from stable_audio_serve.jobs.store.tables import JOBS
from tests.databases import PostgresServer
from tests.jobs.conftest import make_spec
from tests.jobs.stores import CONTRACT_KINDS, ERROR, add, fill, lease, open_database, ref, report, result_of, submit

pytestmark = pytest.mark.server

_NUM_JOBS, _NUM_CLIENTS = 10_000, 10


@pytest.fixture(scope="module", params=CONTRACT_KINDS)
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[JobStore]:
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path_factory.mktemp('plans') / 'jobs.db'}"
    else:
        server: PostgresServer = request.getfixturevalue("postgres")
        url = server.create_database()
    store = JobStore(open_database(url), JobSettings(max_queued=10 * _NUM_JOBS, max_queued_per_key=10 * _NUM_JOBS))
    fill(store, _NUM_JOBS, state="succeeded")
    for number in range(_NUM_CLIENTS):
        fill(store, _NUM_JOBS // _NUM_CLIENTS, state="queued", client=f"client {number}")
    for _ in range(10):
        lease(store, "busy")
    if request.param == "postgresql":
        with store.database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql("ANALYZE")
    yield store
    store.database.close()


def plans(database: Database, call: Callable[[], Any]) -> Iterator[tuple[str, str]]:
    """Run `call`. Yield each SQL statement that it executes, with the statement's query plan."""
    statements: list[tuple[str, Any]] = []

    def record(_c: Any, _cursor: Any, statement: str, parameters: Any, _context: Any, many: bool) -> None:
        statements.append((statement, parameters[0] if many else parameters))

    sa.event.listen(database.engine, "before_cursor_execute", record)
    try:
        call()
    finally:
        sa.event.remove(database.engine, "before_cursor_execute", record)
    explain = "EXPLAIN QUERY PLAN " if database.is_sqlite else "EXPLAIN (FORMAT JSON) "
    with database.reading() as connection:
        for statement, parameters in statements:
            if statement.startswith(("SELECT", "UPDATE", "DELETE", "WITH")):
                rows = connection.exec_driver_sql(explain + statement, parameters).all()
                yield statement, "\n".join(row[-1] if database.is_sqlite else json.dumps(row[0]) for row in rows)


def faults(plan: str, *, is_sqlite: bool) -> list[str]:
    """Return the parts of a query plan that scan a whole large table or sort many rows."""
    if is_sqlite:
        by_whole_index = r" USING (?:COVERING )?INDEX (?:jobs_of_client|events_of_job)"
        return re.findall(rf"SCAN (?:jobs|events|files)(?:{by_whole_index}|(?! USING)).*|USE TEMP B-TREE.*", plan)
    nodes = json.loads(plan)
    found = []
    while nodes:
        node = nodes.pop()
        node = node.get("Plan", node)
        nodes += node.get("Plans", [])
        # Scanning a smaller table is allowed.
        if node["Node Type"] == "Seq Scan" and node["Relation Name"] == JOBS.name:
            found.append("Seq Scan")
        is_by_key = node.get("Index Name") == "jobs_pkey" and "Index Cond" not in node
        if node["Node Type"].startswith("Index") and is_by_key:
            found.append("scan of all jobs in the order of their numbers")
        if node["Node Type"] == "Sort" and node["Plan Rows"] > 100:
            found.append(f"Sort of {node['Plan Rows']} rows")
    return found


CALLS: dict[str, Callable[[JobStore], Any]] = {
    "add": lambda store: submit(store, make_spec(client="k", idempotency_key="plan", fingerprint="f")),
    "add again": lambda store: submit(store, make_spec(client="k", idempotency_key="plan", fingerprint="f")),
    "get": lambda store: store.clients.get(ref("x")),
    "get by a link": lambda store: store.clients.find_unguessable("sa3", "x"),
    "get as an operator": lambda store: store.operators.find_all("x"),
    "list": lambda store: store.clients.list_own("sa3", "", cursor=add(store).spec.id),
    "list of a state": lambda store: store.clients.list_own("sa3", "k", state="failed"),
    "events": lambda store: store.clients.events(ref("x"), after=5),
    "position": lambda store: store.clients.position(add(store)),
    "cancel": lambda store: store.clients.cancel(add(store).spec.ref),
    "find file": lambda store: store.files.find("x"),
    "lease": lambda store: lease(store),
    "lease of models": lambda store: lease(store, models=["demo", "other"]),
    "lease of another model": lambda store: store.runners.lease("me", lease_s=1, models=["other"]),
    "renew": lambda store: store.runners.renew("busy", lease_s=15, refs=[ref(f"{n:032x}") for n in range(64)]),
    "reclaim": lambda store: store.runners.reclaim(max_attempts=3),
    "report": lambda store: report(store, lease(store), stage="x", fraction=0.5),
    "succeed": lambda store: (lambda job: store.runners.succeed(job, result_of(job)))(lease(store)),
    "fail": lambda store: store.runners.fail(lease(store), ERROR, is_dead_letter=True),
    "requeue": lambda store: store.runners.requeue(lease(store), delay_s=1, attempts=1, message="x"),
    "sections": lambda store: store.sections.find(ref("x")),
    "expire": lambda store: store.runners.expire(),
    "waiting work": lambda store: store.operators.waiting_work(),
    "unfinished": lambda store: store.operators.unfinished(),
    "set back": lambda store: store.runners.set_back(),
    "outlook": lambda store: store.runners.outlook("busy"),
    "dead letters": lambda store: store.operators.list_all(dead_letters=True),
    "page of dead letters": lambda store: store.dead_letters.page(before=5_000),
    "one dead letter": lambda store: store.dead_letters.find(5),
    "retry": lambda store: store.dead_letters.retry_job(ref("x")),
    "retry several": lambda store: store.dead_letters.retry(range(500)),
    "delete several": lambda store: store.dead_letters.delete(range(500)),
    "unreferenced": lambda store: store.retention.unreferenced([f"uploads/{number}" for number in range(50)]),
    "purge": lambda store: store.retention.purge(age_s=1_000_000),
    "claim a webhook": lambda store: Outbox(store.database).claim(for_s=10),
}


@pytest.mark.parametrize("name", CALLS)
def test_uses_indexes(store: JobStore, name: str) -> None:
    found = list(plans(store.database, lambda: CALLS[name](store)))
    assert found
    for statement, plan in found:
        assert not faults(plan, is_sqlite=store.database.is_sqlite), f"{statement}\n{plan}"


@pytest.mark.server
@pytest.mark.parametrize("before", [{"queued": 30}, {"queued": 0, "succeeded": _NUM_JOBS}], ids=["short", "empty"])
def test_queue_that_outgrows_its_statistics_is_not_sorted(postgres_url: str, before: dict[str, int]) -> None:
    """When the queue grows, PostgreSQL plans queries for few rows until it updates its statistics."""
    store = JobStore(open_database(postgres_url), JobSettings(max_queued=10 * _NUM_JOBS))

    def num_rows_read() -> int:
        with store.database.reading() as connection:
            connection.execute(sa.select(sa.func.pg_stat_force_next_flush()))
            query = "SELECT seq_tup_read + idx_tup_fetch FROM pg_stat_user_tables WHERE relname = 'jobs'"
            rows: int = connection.exec_driver_sql(query).scalar_one()
            return rows

    for state, count in before.items():
        fill(store, count, state=state)
    with store.database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("ANALYZE")
    for _ in range(20):
        store.runners.lease("me", lease_s=15)
    fill(store, _NUM_JOBS, state="queued")
    num_before = num_rows_read()
    for _ in range(20):
        lease(store)
    assert num_rows_read() - num_before < 20 * 50
    store.database.close()
