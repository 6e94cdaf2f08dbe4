"""What processor time an answer and a submission cost the server around its models, with one ingress replica and with
two, and what Ray's own processes cost per replica while nothing is asked: on stand-ins whose device is a clock.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.arrivals import draw_arrivals
from benchmarks.cases.engine import resolve_model
from benchmarks.cases.jobs_http import send
from benchmarks.cases.scale import wait_for_replicas
from benchmarks.client import another_process
from benchmarks.http_load import load_generator, require_clips
from benchmarks.metrics import percentile
from benchmarks.servers.cpu_times import read_cpu_s
from benchmarks.servers.process import Server, model_args, running_server, write_config
from benchmarks.settings import CaseSettings
from benchmarks.workload import Mix
from stable_audio_serve.models.registry import ModelEntry

_STAND_IN = "benchmarks.servers.timed:build"
_MIXES = {
    f"{seconds:g} s": Mix(f"{seconds:g} s", durations_s=((seconds, 1.0),), steps=((8, 1.0),), spread=0.0)
    for seconds in (1.0, 10.0)
}
_JOB = {"prompt": "a low drone", "duration": 1.0, "steps": 8}
_WARM_UP = 10
_SETTLE_S = 3.0


@dataclass(frozen=True, slots=True)
class IngressLoad:
    """`requests` of each kind, so many a second, to servers with each number of ingress replicas; for `idle_s` nothing
    is asked of servers with each number of model replicas."""

    ingresses: tuple[int, ...] = (1, 2)
    requests: int = 120
    rate_hz: float = 20.0
    replicas: int = 4
    idle_replicas: tuple[int, ...] = (2, 8)
    idle_s: float = 10.0


FULL = IngressLoad(requests=1200, idle_s=60.0)


def run_ingress_case(settings: CaseSettings, load: IngressLoad | None = None) -> dict[str, Any]:
    """Milliseconds of processor time by role, and latencies. Raises RuntimeError for a wrong answer."""
    load = load or (FULL if settings.full else IngressLoad())
    entry = resolve_model(settings.model)
    return {
        "load": asdict(load),
        "ingresses": {count: _measure_load(settings, load, entry=entry, ingresses=count) for count in load.ingresses},
        "idle_cores": {
            count: _measure_idle(settings, load, entry=entry, replicas=count) for count in load.idle_replicas
        },
    }


def _measure_load(settings: CaseSettings, load: IngressLoad, *, entry: ModelEntry, ingresses: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        config = _write(Path(folder), settings, entry=entry, replicas=load.replicas, ingresses=ingresses)
        with running_server(config) as server, load_generator(server.url) as client, another_process() as sender:
            wait_for_replicas(server, {entry.card.name: load.replicas})
            figures = {}
            for name, mix in _MIXES.items():
                arrivals = draw_arrivals(
                    mix, rate_hz=load.rate_hz, count=load.requests, seed=1, max_duration_s=entry.card.max_duration_s
                ).arrivals
                client.send(entry.card.name, arrivals[:_WARM_UP])
                with _used(server, load.requests) as used:
                    sent = client.send(entry.card.name, arrivals)
                require_clips(sent, arrivals, channels=entry.card.channels, sample_rate_hz=entry.card.sample_rate_hz)
                figures[f"answer of {name}"] = {
                    "cpu_ms": used.cpu_ms,
                    "num_bytes": sent.sent[0].num_bytes,
                    "added_p50_ms": percentile([one.added_ms for one in sent.sent], 0.5),
                }
            jobs = [("POST", "/jobs", _JOB)] * load.requests
            sender.submit(send, server.url, jobs[:_WARM_UP], rate_hz=load.rate_hz).result()
            time.sleep(_SETTLE_S)
            with _used(server, load.requests) as used:
                submitted = sender.submit(send, server.url, jobs, rate_hz=load.rate_hz).result()
                time.sleep(_SETTLE_S)  # so that they are done too
            figures["job"] = {
                "cpu_ms": used.cpu_ms,
                "added_p50_ms": percentile([one.latency_ms for one in submitted], 0.5),
            }
    return figures


def _measure_idle(settings: CaseSettings, load: IngressLoad, *, entry: ModelEntry, replicas: int) -> dict[str, float]:
    """Cores used by role; `ray` has the controller, the head's processes and the node's."""
    with tempfile.TemporaryDirectory() as folder:
        config = _write(Path(folder), settings, entry=entry, replicas=replicas, ingresses=1)
        with running_server(config) as server:
            wait_for_replicas(server, {entry.card.name: replicas})
            time.sleep(_SETTLE_S)
            with _used(server, 1) as used:
                time.sleep(load.idle_s)
    return {role: ms / 1000.0 / load.idle_s for role, ms in used.cpu_ms.items()}


@dataclass(slots=True)
class _Used:
    cpu_ms: dict[str, float] = field(default_factory=dict)


@contextmanager
def _used(server: Server, requests: int) -> Iterator[_Used]:
    """Gives what will hold the processor time of the block by role, milliseconds for each of `requests`."""
    before_s, used = read_cpu_s(server.pid), _Used()
    yield used
    for role, now_s in read_cpu_s(server.pid).items():
        used.cpu_ms[role] = (now_s - before_s.get(role, 0.0)) * 1000.0 / requests


def _write(folder: Path, settings: CaseSettings, *, entry: ModelEntry, replicas: int, ingresses: int) -> Path:
    models = [model_args(entry, name=entry.card.name, threads=settings.threads, replicas=replicas)]
    ingress = {"replicas": ingresses, "max_ongoing_requests": 10_000}
    jobs = {"max_queued_per_key": 10_000}
    return write_config(
        folder, entry, threads=settings.threads, import_path=_STAND_IN, models=models, ingress=ingress, jobs=jobs
    )


def rows(results: Mapping[str, Any]) -> list[dict[str, object]]:
    """Milliseconds of processor time."""
    return [
        {
            "ingress_replicas": count,
            "request": kind,
            "ingress_ms": figures["cpu_ms"].get("ingress", 0.0),
            "proxy_ms": figures["cpu_ms"].get("proxy", 0.0),
            "replica_ms": figures["cpu_ms"].get("replicas", 0.0),
            "others_ms": figures["cpu_ms"].get("ray", 0.0),
            "added_p50_ms": figures["added_p50_ms"],
        }
        for count, kinds in results["ingresses"].items()
        for kind, figures in kinds.items()
    ]
