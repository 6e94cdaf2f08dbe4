"""Jobs over HTTP: submissions at a fixed rate, with somebody watching; whether many polls slow the engine down; and how
often idle runners ask their database.

Submissions go to the whole server, whose runner meanwhile does sixteen jobs a second on an engine that takes time but
no processor of this machine, as many as it can on one that takes no time, or what the real model on the same cores gets
done; polls go to the real model. Load is sent from another process, at fixed times: a late answer counts in full.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from http.client import HTTPConnection
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from benchmarks.cases.engine import resolve_model
from benchmarks.cases.http import Call, call
from benchmarks.client import another_process
from benchmarks.metrics import summarize, worst_ratio
from benchmarks.servers.instant import REMOTE_S
from benchmarks.servers.process import running_server, write_config
from benchmarks.settings import CaseSettings
from stable_audio_serve.core.generation import GenerationRequest

_JOB = {"prompt": "a low drone", "duration": 1.0, "steps": 8}
_WATCHED = 50  # jobs whose status is asked for in turn
_CONNECTIONS = 64
_TIMEOUT_S = 60.0
_DRAIN_TIMEOUT_S = 300.0
_WATCH_HZ = 20.0
_CLIP_S = 10.0
_PACES: dict[str, tuple[str, dict[str, object]]] = {
    "beside 16 jobs a second": ("benchmarks.servers.instant:build_remote", {"max_running": round(16 * REMOTE_S)}),
    "beside as many jobs as can be": ("benchmarks.servers.instant:build", {}),
    "beside the model at work": ("stable_audio_serve.serving.app:build", {}),
}
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
    submissions: dict[str, list[dict[str, Any]]] = {}
    for pace, (import_path, jobs) in _PACES.items():
        with tempfile.TemporaryDirectory() as folder:
            config = write(Path(folder), import_path=import_path, jobs={"max_queued_per_key": 10_000, **jobs})
            with running_server(config) as server, another_process() as sender, another_process() as watcher:
                submissions[pace] = [
                    measure_submissions(server.url, sender, watcher=watcher, load=load) for _ in range(settings.rounds)
                ]
    with (
        tempfile.TemporaryDirectory() as folder,
        running_server(write(Path(folder))) as server,
        another_process() as sender,
    ):
        polls = [measure_polls(server.url, sender, load=load, model=entry.card.name) for _ in range(settings.rounds)]
    idle = measure_idle_runners(write, load)
    return {
        "load": asdict(load),
        "target": {"submit_p50_ms": 30.0, "queries_per_s_and_idle_runner": 1.0},
        "worst_submit_p50_ms": {
            pace: max(run["submit"]["p50_ms"] for run in runs) for pace, runs in submissions.items()
        },
        "worst_status_p95_ms": {
            pace: max(run["status"]["p95_ms"] for run in runs) for pace, runs in submissions.items()
        },
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
    url: str, sender: ProcessPoolExecutor, *, watcher: ProcessPoolExecutor, load: Load
) -> dict[str, Any]:
    """Submit for a while, with a watcher asking for states. Raises RuntimeError when jobs are not done at all."""
    watched = [sent.answer["id"] for sent in send(url, [("POST", "/jobs", _JOB)] * 2, rate_hz=_WATCH_HZ)]
    count, watches = round(load.submit_hz * load.submit_s), round(_WATCH_HZ * load.submit_s)
    watching = watcher.submit(send, url, _gets(watched, watches), rate_hz=_WATCH_HZ)
    started_at = time.monotonic()
    submitted = sender.submit(send, url, [("POST", "/jobs", _JOB)] * count, rate_hz=load.submit_hz).result()
    submit_s = time.monotonic() - started_at
    statuses = watching.result()
    _wait_until_over(url, [sent.answer["id"] for sent in submitted[:_WATCHED]])
    return {
        "jobs": count,
        "submit_s": submit_s,
        "submit": asdict(summarize([sent.latency_ms for sent in submitted])),
        "status": asdict(summarize([sent.latency_ms for sent in statuses])),
    }


def measure_polls(url: str, sender: ProcessPoolExecutor, *, load: Load, model: str) -> dict[str, Any]:
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
            with running_server(
                write(Path(folder), import_path="benchmarks.servers.instant:build", jobs=jobs)
            ) as server:
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

    Threads with the standard library's client: others take more processor time, which the server on this machine needs.
    Raises RuntimeError for an answer that is no 2xx.
    """
    own = threading.local()
    started_at = time.perf_counter() + 0.1

    def one(index: int, request: tuple[str, str, Mapping[str, object] | None]) -> Sent:
        method, path, body = request
        if not hasattr(own, "connection"):
            own.connection = HTTPConnection(url.removeprefix("http://"), timeout=_TIMEOUT_S)
        content = None if body is None else json.dumps(body)
        own.connection.request(method, path, content, {"Content-Type": "application/json"})
        answer = own.connection.getresponse()
        text = answer.read()
        latency_ms = (time.perf_counter() - started_at - index / rate_hz) * 1000.0
        if not 200 <= answer.status < 300:
            raise RuntimeError(f"{method} {path}: {answer.status} {text[:200]!r}")
        return Sent(latency_ms, json.loads(text))

    with ThreadPoolExecutor(_CONNECTIONS) as pool:
        pending = []
        for index, request in enumerate(requests):
            time.sleep(max(0.0, started_at + index / rate_hz - time.perf_counter()))
            pending.append(pool.submit(one, index, request))
        return [future.result() for future in pending]


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


def rows(results: Mapping[str, Any]) -> list[dict[str, object]]:
    """How fast jobs are accepted, and what asking about them costs."""
    figures = {
        "poll_p95_ms": results["worst_poll_p95_ms"],
        "engine_polled_over_quiet": results["engine_polled_over_quiet_ratio"],
        "queries_per_s_and_idle_runner": results["queries_per_s_and_idle_runner"],
    }
    for pace, p50_ms in results["worst_submit_p50_ms"].items():
        figures |= {f"submit_p50_ms {pace}": p50_ms, f"status_p95_ms {pace}": results["worst_status_p95_ms"][pace]}
    return [{"figure": name, "value": value} for name, value in figures.items()]
