"""The server that all tests of this folder share. One test process runs these tests and then stops the server."""

from __future__ import annotations

import os
import re
import signal
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from typing import Any

import httpx
import pytest

from tests.patience import PATIENCE_S, wait_until
from tests.serving.conftest import TINY, model
from tests.serving.launched import APPLICATION, LaunchedServer, free_port, write_config

OVER = ("succeeded", "failed", "cancelled")
_JOBS = {"webhook_allow_hosts": ["127.0.0.1"], "lease_s": 3.0}


@pytest.fixture(scope="package")
def metrics_port() -> int:
    return free_port()


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory, metrics_port: int) -> Iterator[LaunchedServer]:
    """Run a server without API keys.

    It has HAProxy, two HTTP processes (ingress), a job runner, and the models `tiny` and `demo`.
    """
    folder = tmp_path_factory.mktemp("server")
    # The path is relative to the server's working directory.
    tiny = model(
        "tiny", os.path.relpath(TINY, folder), aliases=["little"], max_queue_s=1e6, replicas={"max_replicas": 1}
    )
    demo = model("demo", None, threads=1, max_queue_s=1e6, replicas={"max_replicas": 1})
    args = {
        "models": [tiny, demo],
        "preload_models": ["tiny", "demo"],
        "ingress": {"replicas": 2},
        "jobs": _JOBS,
    }
    launched = LaunchedServer(
        write_config(folder, args),
        *("--metrics-port", str(metrics_port)),
        environment={
            "STABLE_AUDIO_MAX_STEPS": "1000",
            "STABLE_AUDIO_MAX_DURATION": "20",
            "RAY_metrics_report_interval_ms": "1000",
            "http_proxy": "http://127.0.0.1:9",  # a proxy that does not exist: local connections must not use it
        },
    )
    try:
        launched.probes = probe_start(launched)
        yield launched.wait_until_ready()
    finally:
        launched.stop(number=signal.SIGKILL)


def count_ended(metrics_port: int) -> Counter[str]:
    """Return how many requests have left the engine of `tiny`, by outcome. The latest requests may be missing."""
    page = httpx.get(f"http://127.0.0.1:{metrics_port}/metrics", timeout=PATIENCE_S).text
    ended: Counter[str] = Counter()
    for labels, number in re.findall(r"^ray_stable_audio_engine_requests_total{(.*)} (\S+)$", page, re.MULTILINE):
        values = dict(re.findall(r'(\w+)="(.*?)"', labels))
        if values["model"] == "tiny":
            ended[values["outcome"]] += int(float(number))
    return ended


def probe_start(launched: LaunchedServer) -> list[tuple[httpx.Response, int]]:
    """Poll `/health` and `/ready` until the server is ready. The replica of `tiny` is suspended until the second poll,
    because otherwise the model might be loaded before the HTTP processes have started.

    Returns the answer of `/health` and the status of `/ready` at each poll.
    """
    answers: list[tuple[httpx.Response, int]] = []
    deadline, replica, was_found = time.monotonic() + PATIENCE_S, f"ServeReplica:{APPLICATION}:tiny", False
    with ExitStack() as suspended, httpx.Client(base_url=launched.url, timeout=30) as client:
        while time.monotonic() < deadline and not (answers and answers[-1][1] == 200):
            if launched.process.poll() is not None:
                break
            if not was_found:  # not polled yet, because HAProxy may hold a request until the model is loaded
                time.sleep(0.1)  # each search takes 20 ms of CPU time, which the server needs to start
                with suppress(OSError, ValueError, AssertionError):  # the folder or the replica does not exist yet
                    suspended.enter_context(launched.suspended(replica))
                    was_found = True
                continue
            if len(answers) >= 2:
                suspended.close()
            time.sleep(0.05)
            with suppress(httpx.TransportError):  # the server does not listen yet
                health, ready = client.get("/health"), client.get("/ready").status_code
                if "loaded_models" in health.text:  # otherwise HAProxy itself answered
                    answers.append((health, ready))
    return answers


def make_body(**overrides: Any) -> dict[str, Any]:
    return {"prompt": "rain on a tin roof", "duration": 2, "seed": 1, "steps": 2} | overrides


def make_long_body(**overrides: Any) -> dict[str, Any]:
    """Return the body of a request that keeps the tiny model busy for minutes."""
    rk4 = {"sampler_type": "rk4"}
    return make_body(steps=1000, batch_size=4, cfg_scale=3, duration=16, sampler_kwargs=rk4) | overrides


def submit(server: LaunchedServer, body: Mapping[str, Any]) -> str:
    reply = server.client.post("/jobs", json=body)
    assert reply.status_code == 202, reply.text
    job_id: str = reply.json()["id"]
    return job_id


def wait(server: LaunchedServer, job_id: str, *statuses: str) -> dict[str, Any]:
    """Wait until the job has one of `statuses`, by default until it ends. Returns the job."""

    def read() -> dict[str, Any]:
        job: dict[str, Any] = server.client.get(f"/jobs/{job_id}").json()
        return job if job["status"] in (statuses or OVER) else {}

    return wait_until(read)
