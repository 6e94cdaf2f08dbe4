"""Jobs over HTTP: submissions at a fixed rate, with somebody watching; whether many polls slow the engine down; and how
often idle runners ask their database.

Submissions go to the whole server around an engine that takes no time, so that its runner works through them meanwhile;
polls go to the real model. Load is sent from another process, at fixed times: a late answer counts in full.
"""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from benchmarks.engine_case import resolve_model
from benchmarks.http_case import Call, call
from benchmarks.metrics import summarize, worst_ratio
from benchmarks.server import running_server, write_config
from benchmarks.settings import CaseSettings
from stable_audio_serve.core.generation import GenerationRequest

_JOB = {"prompt": "a low drone", "duration": 1.0, "steps": 8}
_WATCHED = 50  # jobs whose status is asked for in turn
_CONNECTIONS = 64
_DRAIN_TIMEOUT_S = 300.0
_WATCH_HZ = 20.0
_CLIP_S = 10.0
_SETTLE_S = 10.0  # runners fall asleep by and by
_STATEMENT = re.compile(r"LOG:  (?:statement|execute [^:]+): (.*)")
_NO_QUERY = re.compile(r";|BEGIN.*|COMMIT|ROLLBACK")


@dataclass(frozen=True, slots=True)
class Load:
    """How much: jobs and polls per second, idle runners, and how long each lasts."""

    submit_hz: float = 100.0
    submit_s: float = 30.0
    poll_hz: float = 150.0
    poll_s: float = 10.0
    idle_runners: int = 2
    idle_s: float = 30.0


@dataclass(frozen=True, slots=True)
class Sent:
    """One request of a load: milliseconds from the time it was due to the end of its answer, and that answer."""

    latency_ms: float
    answer: Any


def run_jobs_http_case(settings: CaseSettings, load: Load | None = None) -> dict[str, Any]:
    """Submissions and polls `settings.rounds` times each, the worse round counts; then idleness, once."""
    load = load or Load()
    entry = resolve_model(settings.model)
    write = partial(write_config, entry=entry, threads=settings.threads)
    with tempfile.TemporaryDirectory() as folder:
        config = write(Path(folder), import_path="benchmarks.instant:build", jobs={"max_queued_per_key": 10_000})
        with running_server(config) as server, _sender() as sender, _sender() as watcher:
            submissions = [measure_submissions(server.url, sender, watcher, load) for _ in range(settings.rounds)]
    with tempfile.TemporaryDirectory() as folder, running_server(write(Path(folder))) as server, _sender() as sender:
        polls = [measure_polls(server.url, sender, load, model=entry.name) for _ in range(settings.rounds)]
    idle = measure_idle_runners(write, load)
    return {
        "load": asdict(load),
        "target": {"submit_p50_ms": 30.0, "queries_per_s_and_idle_runner": 1.0},
        "worst_submit_p50_ms": max(run["submit"]["p50_ms"] for run in submissions),
        "worst_status_p95_ms": max(run["status"]["p95_ms"] for run in submissions),
        "worst_poll_p95_ms": max(run["poll"]["p95_ms"] for run in polls),
        "engine_polled_over_quiet_ratio": worst_ratio(
            [(run["engine_polled"]["p50_ms"], run["engine_quiet"]["p50_ms"]) for run in polls], larger_is_better=False
        ),
        "queries_per_s_and_idle_runner": idle and idle["queries_per_s_and_runner"],
        "idle": idle,
        "submissions": submissions,
        "polls": polls,
    }


def measure_submissions(
    url: str, sender: ProcessPoolExecutor, watcher: ProcessPoolExecutor, load: Load
) -> dict[str, Any]:
    """Submit for a while, with a watcher asking for states; then wait until all is done. Raises RuntimeError."""
    watched = [sent.answer["id"] for sent in send(url, [("POST", "/jobs", _JOB)] * 2, rate_hz=_WATCH_HZ)]
    count, watches = round(load.submit_hz * load.submit_s), round(_WATCH_HZ * load.submit_s)
    watching = watcher.submit(send, url, _gets(watched, watches), rate_hz=_WATCH_HZ)
    started_at = time.monotonic()
    submitted = sender.submit(send, url, [("POST", "/jobs", _JOB)] * count, rate_hz=load.submit_hz).result()
    submit_s = time.monotonic() - started_at
    statuses = watching.result()
    _wait_until_over(url, [sent.answer["id"] for sent in submitted])
    return {
        "jobs": count,
        "submit_s": submit_s,
        "all_done_s": time.monotonic() - started_at,
        "submit": asdict(summarize([sent.latency_ms for sent in submitted])),
        "status": asdict(summarize([sent.latency_ms for sent in statuses])),
    }


def measure_polls(url: str, sender: ProcessPoolExecutor, load: Load, *, model: str) -> dict[str, Any]:
    """The engine's own time for one clip after the other, first in quiet, then while finished jobs are polled."""
    ids = [sent.answer["id"] for sent in send(url, [("POST", "/jobs", _JOB)] * _WATCHED, rate_hz=load.poll_hz)]
    _wait_until_over(url, ids)
    request = GenerationRequest(prompt="a low drone", duration_s=_CLIP_S, seed=1, steps=8)
    count = round(load.poll_hz * load.poll_s)
    sender.submit(send, url, _gets(ids, _WATCHED), rate_hz=load.poll_hz).result()  # starts the process
    _time_clips(url, request, model=model, for_s=1.0)
    quiet = _time_clips(url, request, model=model, for_s=load.poll_s)
    polling = sender.submit(send, url, _gets(ids, count), rate_hz=load.poll_hz)
    polled = _time_clips(url, request, model=model, until=polling)
    polls = polling.result()
    return {
        "clips": {"quiet": len(quiet), "polled": len(polled)},
        "engine_quiet": asdict(summarize([clip.engine_ms for clip in quiet])),
        "engine_polled": asdict(summarize([clip.engine_ms for clip in polled])),
        "http_quiet_p50_ms": median(clip.wall_ms for clip in quiet),
        "http_polled_p50_ms": median(clip.wall_ms for clip in polled),
        "poll": asdict(summarize([sent.latency_ms for sent in polls])),
    }


def measure_idle_runners(write: Callable[..., Path], load: Load) -> dict[str, Any] | None:
    """What a PostgreSQL of our own is asked while nobody wants anything; None where it is not installed.

    It writes down every statement: queries, and what else the driver sends (checks of connections, transactions).
    """
    from tests.databases import UnavailableError, running_postgres

    try:
        with running_postgres() as database, tempfile.TemporaryDirectory() as folder:
            url = database.create_database()
            database.execute(f"ALTER DATABASE {url.rpartition('/')[2]} SET log_statement = 'all'")
            jobs = {"database_url": url, "runners": load.idle_runners}
            with running_server(write(Path(folder), import_path="benchmarks.instant:build", jobs=jobs)) as server:
                _wait_until_over(server.url, [send(server.url, [("POST", "/jobs", _JOB)], rate_hz=1.0)[0].answer["id"]])
                time.sleep(_SETTLE_S)
                log = database.folder / "log"
                start = log.stat().st_size
                time.sleep(load.idle_s)
                statements = _STATEMENT.findall(log.read_bytes()[start:].decode(errors="replace"))
    except UnavailableError as error:
        print(f"idle runners are left out: {error}")
        return None
    queries = [statement for statement in statements if not _NO_QUERY.fullmatch(statement)]
    per_s_and_runner = 1.0 / (load.idle_s * load.idle_runners)
    return {
        "queries_per_s_and_runner": len(queries) * per_s_and_runner,
        "statements_per_s_and_runner": len(statements) * per_s_and_runner,
        "queries": Counter(query[:60] for query in queries),
    }


def send(url: str, requests: Sequence[tuple[str, str, Mapping[str, object] | None]], *, rate_hz: float) -> list[Sent]:
    """(method, path, JSON body) at fixed times, however late the answers are. Runs in any process.

    Raises RuntimeError for an answer that is no 2xx.
    """
    return asyncio.run(_send(url, requests, rate_hz=rate_hz))


async def _send(
    url: str, requests: Sequence[tuple[str, str, Mapping[str, object] | None]], *, rate_hz: float
) -> list[Sent]:
    limits = httpx.Limits(max_connections=_CONNECTIONS, max_keepalive_connections=_CONNECTIONS)
    async with httpx.AsyncClient(base_url=url, timeout=60.0, limits=limits, trust_env=False) as client:
        started_at = time.perf_counter() + 0.1

        async def one(index: int, method: str, path: str, body: Mapping[str, object] | None) -> Sent:
            due_at = started_at + index / rate_hz
            await asyncio.sleep(max(0.0, due_at - time.perf_counter()))
            answer = await client.request(method, path, json=body)
            latency_ms = (time.perf_counter() - due_at) * 1000.0
            if not answer.is_success:
                raise RuntimeError(f"{method} {path}: {answer.status_code} {answer.text[:200]}")
            return Sent(latency_ms, answer.json())

        return list(await asyncio.gather(*(one(index, *request) for index, request in enumerate(requests))))


def _gets(job_ids: Sequence[str], count: int) -> list[tuple[str, str, None]]:
    return [("GET", f"/jobs/{job_id}", None) for job_id in itertools.islice(itertools.cycle(job_ids), count)]


def _wait_until_over(url: str, job_ids: Sequence[str]) -> None:
    """Until the last of them has ended. Raises RuntimeError when one fails or it takes too long."""
    deadline = time.monotonic() + _DRAIN_TIMEOUT_S
    with httpx.Client(base_url=url, timeout=60.0, trust_env=False) as client:
        for job_id in reversed(job_ids):  # the newest first: once it is over most are
            while (status := client.get(f"/jobs/{job_id}").raise_for_status().json()["status"]) != "succeeded":
                if status == "failed" or time.monotonic() > deadline:
                    raise RuntimeError(f"job {job_id} is {status}")
                time.sleep(0.1)


def _time_clips(
    url: str, request: GenerationRequest, *, model: str, for_s: float = 0.0, until: Future[Any] | None = None
) -> list[Call]:
    async def run() -> list[Call]:
        ends_at = time.monotonic() + for_s
        calls: list[Call] = []
        async with httpx.AsyncClient(base_url=url, timeout=120.0, trust_env=False) as client:
            while not calls or (time.monotonic() < ends_at if until is None else not until.done()):
                calls.append(await call(client, request, model=model))
        return calls

    return asyncio.run(run())


@contextmanager
def _sender() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool
