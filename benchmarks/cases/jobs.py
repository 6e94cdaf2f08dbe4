"""The job store alone, on SQLite and on PostgreSQL: submissions at a fixed rate, leasing from a long queue, and reads.

Both databases write durably. PostgreSQL is one of our own, started for the run, and left out where it is not installed.
"""

from __future__ import annotations

import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from benchmarks.metrics import summarize
from benchmarks.settings import CaseSettings
from stable_audio_serve.core.generation import GenerationRequest
from stable_audio_serve.core.ids import ClientId, JobId
from stable_audio_serve.core.settings import JobSettings
from stable_audio_serve.jobs.job import Job, JobSpec
from stable_audio_serve.jobs.store.database import Database, database_url
from stable_audio_serve.jobs.store.job_store import JobStore
from stable_audio_serve.jobs.store.tables import JOBS

_THREADS = 8  # of one ingress
_LEASE_S = 60.0
_SHORT_QUEUE = 10
_ROOM = JobSettings(max_queued=1_000_000)


@dataclass(frozen=True, slots=True)
class Load:
    """How much of everything."""

    submit_hz: float = 100.0
    submit_s: float = 30.0
    queued: int = 10_000
    clients: int = 10  # whose jobs wait
    leases: int = 300
    reads_s: float = 5.0


def run_jobs_case(settings: CaseSettings, load: Load | None = None) -> dict[str, Any]:
    """Every measurement on every database, `settings.rounds` times; the worse round counts."""
    load = load or Load()
    results: dict[str, Any] = {}
    for name, start in (("sqlite", _sqlite), ("postgresql", _postgresql)):
        rounds = []
        for _ in range(settings.rounds):
            with start() as url:
                if url is None:
                    break
                rounds.append(_measure(url, load))
        if rounds:
            results[name] = {
                "worst_submit_p50_ms": max(run["submit"]["p50_ms"] for run in rounds),
                "worst_submit_p95_ms": max(run["submit"]["p95_ms"] for run in rounds),
                "worst_lease_p95_ms": max(run["lease_long_queue"]["p95_ms"] for run in rounds),
                "worst_lease_long_over_short_ratio": max(run["lease_long_over_short_ratio"] for run in rounds),
                "worst_reads_per_s": min(run["reads_per_s"] for run in rounds),
                "rounds": rounds,
            }
    target = {"submit_p50_ms": 4.0, "lease_p95_ms": 5.0, "reads_per_s": 1000.0}
    return {"load": asdict(load), "target": target, "databases": results}


def _measure(url: str, load: Load) -> dict[str, Any]:
    store = open_store(url)
    store.database.prepare()
    submit = time_submissions(store, rate_hz=load.submit_hz, for_s=load.submit_s)
    forget(store)
    fill(store, _SHORT_QUEUE + load.leases, state="queued")
    short_ms = time_calls(lambda: _lease(store), load.leases)
    forget(store)
    fill(store, load.queued, state="succeeded")
    for number in range(load.clients):
        fill(store, (load.queued + load.leases) // load.clients, state="queued", client=f"client {number}")
    long_ms = time_calls(lambda: _lease(store), load.leases)
    job = store.operators.list_all(state="queued", limit=1)[0]
    short, long = summarize(short_ms), summarize(long_ms)
    figures = {
        "submit": asdict(summarize(submit)),
        "submit_to_long_queue": asdict(summarize(time_calls(lambda: store.clients.add(make_spec()), load.leases))),
        "lease_short_queue": asdict(short),
        "lease_long_queue": asdict(long),
        "lease_long_over_short_ratio": long.p50_ms / short.p50_ms,
        "look_long_queue": asdict(summarize(time_calls(lambda: store.runners.look("idle"), load.leases))),
        "position_long_queue": asdict(summarize(time_calls(lambda: store.clients.position(job), load.leases))),
        "reads_per_s": reads_per_s(store, job, for_s=load.reads_s),
    }
    store.database.close()
    return figures


def open_store(url: str) -> JobStore:
    """A store without limits."""
    return JobStore(Database(database_url(url, Path("/nowhere"))), _ROOM)


def make_spec(*, client: str = "") -> JobSpec:
    """A job like any other."""
    request = GenerationRequest(prompt="a low drone under slow rain, far away", duration_s=10.0, seed=7, steps=8)
    return JobSpec(
        id=JobId(uuid.uuid4().hex),
        contract="sa3",
        model="demo",
        mode="text-to-audio",
        request=request,
        client=ClientId(client),
    )


def fill(store: JobStore, count: int, *, state: str, client: str = "") -> None:
    """Add `count` jobs in one statement."""
    if not count:
        return
    template = store.clients.add(make_spec(client=client)).job.spec.id
    copied = [column for column in JOBS.c if column.name not in ("seq", "id", "state", "completed_at")]
    number = sa.select(sa.literal(1).label("n")).cte("numbers", recursive=True)
    number = number.union_all(sa.select(number.c.n + 1).where(number.c.n < count))
    own = {
        "id": sa.literal(f"{uuid.uuid4().hex}-") + sa.cast(number.c.n, sa.Text),
        "state": sa.literal(state),
        "completed_at": sa.null() if state == "queued" else JOBS.c.created_at + number.c.n * 1e-6,
    }
    rows = sa.select(*copied, *own.values()).select_from(JOBS.join(number, sa.true())).where(JOBS.c.id == template)
    with store.database.writing() as connection:
        connection.execute(sa.insert(JOBS).from_select([*(column.name for column in copied), *own], rows))
        connection.execute(sa.delete(JOBS).where(JOBS.c.id == template))


def forget(store: JobStore) -> None:
    """Every job."""
    with store.database.writing() as connection:
        connection.execute(sa.delete(JOBS))


def time_submissions(store: JobStore, *, rate_hz: float, for_s: float) -> list[float]:
    """Milliseconds from the time each job was due to be submitted until it was kept."""
    specs = [make_spec() for _ in range(round(rate_hz * for_s))]
    with ThreadPoolExecutor(_THREADS) as pool:
        started_at = time.perf_counter() + 0.1

        def submit(index: int, spec: JobSpec) -> float:
            store.clients.add(spec)
            return (time.perf_counter() - started_at - index / rate_hz) * 1000.0

        pending = []
        for index, spec in enumerate(specs):
            time.sleep(max(0.0, started_at + index / rate_hz - time.perf_counter()))
            pending.append(pool.submit(submit, index, spec))
        return [future.result() for future in pending]


def time_calls(call: Callable[[], object], count: int) -> list[float]:
    """Milliseconds of each of `count` calls, one after the other."""
    times_ms = []
    for _ in range(count):
        started_at = time.perf_counter()
        call()
        times_ms.append((time.perf_counter() - started_at) * 1000.0)
    return times_ms


def reads_per_s(store: JobStore, job: Job, *, for_s: float, threads: int = 2) -> float:
    """How often the state of a job can be asked for, by several threads of one process."""
    ends_at = time.perf_counter() + for_s
    counts: list[int] = []

    def read() -> None:
        count = 0
        while time.perf_counter() < ends_at:
            store.clients.get(job.spec.ref)
            count += 1
        counts.append(count)

    readers = [threading.Thread(target=read) for _ in range(threads)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    return sum(counts) / for_s


def _lease(store: JobStore) -> Job:
    job = store.runners.lease("runner", lease_s=_LEASE_S)
    if job is None:
        raise RuntimeError("the queue ran out of jobs")
    return job


@contextmanager
def _sqlite() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        yield f"sqlite:///{folder}/jobs.db"


@contextmanager
def _postgresql() -> Iterator[str | None]:
    from tests.databases import UnavailableError, running_postgres

    try:
        with running_postgres() as server:
            yield server.create_database()
    except UnavailableError as error:
        print(f"PostgreSQL is left out: {error}")
        yield None


def rows(results: Mapping[str, Any]) -> list[dict[str, object]]:
    """What keeping a job costs, by database."""
    return [
        {
            "database": name,
            "submit_p50_ms": figures["worst_submit_p50_ms"],
            "submit_p95_ms": figures["worst_submit_p95_ms"],
            "lease_p95_ms": figures["worst_lease_p95_ms"],
            "long_over_short": figures["worst_lease_long_over_short_ratio"],
            "reads_per_s": figures["worst_reads_per_s"],
        }
        for name, figures in results["databases"].items()
    ]
