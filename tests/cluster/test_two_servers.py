"""NGINX as it is shipped before two real servers that share PostgreSQL and a bucket: one of them may go at any time."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.cluster.balancers import configured, start
from tests.databases import PostgresServer
from tests.object_storage import ObjectStorage
from tests.serving.conftest import TINY
from tests.serving.launched import LaunchedServer, free_port, write_config

pytestmark = pytest.mark.cluster

_PATIENCE_S = 90.0
_OVER = ("succeeded", "failed", "cancelled")


@pytest.fixture(scope="module")
def servers(
    postgres: PostgresServer, _object_storage: ObjectStorage, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Sequence[LaunchedServer]]:
    args = {
        "models": [{"name": "tiny", "path": TINY, "max_queue_s": 1e6}],
        "jobs": {"database_url": postgres.create_database(), "lease_s": 5.0, "max_running": 2},
    }
    environment = _object_storage.environ(_object_storage.make_bucket())
    started = [
        LaunchedServer(write_config(tmp_path_factory.mktemp("server"), args), environment=environment) for _ in range(2)
    ]
    try:
        yield [server.wait_until_ready() for server in started]
    finally:
        for server in started:
            if server.process.poll() is None:
                server.stop()


@pytest.fixture(scope="module")
def balanced(servers: Sequence[LaunchedServer], tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A client of the balancer."""
    port = free_port()
    first, second = (server.port for server in servers)
    process = start("nginx", configured("nginx", tmp_path_factory.mktemp("nginx"), ports=(first, second), port=port))
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            wait_until_there(client)
            yield client
    finally:
        process.terminate()
        process.wait(30)


def wait_until_there(client: httpx.Client) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            assert client.get("/ready").status_code == 200
            return
        except httpx.TransportError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def wait(client: httpx.Client, job_id: str) -> dict[str, Any]:
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        job: dict[str, Any] = client.get(f"/jobs/{job_id}").raise_for_status().json()
        if job["status"] in _OVER:
            return job
        assert time.monotonic() < deadline, job
        time.sleep(0.05)


def test_job_of_one_server_is_read_from_the_other(servers: Sequence[LaunchedServer]) -> None:
    one, other = servers
    body = {"prompt": "rain", "duration": 2, "steps": 2, "seed": 1}
    job_id = one.client.post("/jobs", json=body).raise_for_status().json()["id"]
    job = wait(other.client, job_id)
    assert job["status"] == "succeeded", job
    made = other.client.post("/generate", json=body | {"model": "tiny"}).raise_for_status()
    assert httpx.get(job["download_url"]).raise_for_status().content == made.content
    assert {job["id"] for job in other.client.get("/jobs").json()["jobs"]} >= {job_id}


class Load:
    """Two callers that submit jobs and come again when they are told to, and two that wait for their audio."""

    def __init__(self, client: httpx.Client) -> None:
        self._client = client
        self._ended = threading.Event()
        self.jobs: dict[str, str] = {}  # by the caller's own key
        self.num_refused = 0
        self.made: list[httpx.Response] = []

    def __enter__(self) -> Load:
        self._pool = ThreadPoolExecutor(4)
        self._callers = [self._pool.submit(call) for call in (self._submit, self._submit, self._make, self._make)]
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._pool.shutdown()
        for caller in self._callers:
            caller.result()

    def _submit(self) -> None:
        while not self._ended.is_set():
            key = str(uuid.uuid4())
            while (answer := self._post("/jobs", headers={"Idempotency-Key": key})).status_code == 503:
                self.num_refused += 1
                time.sleep(float(answer.headers["retry-after"]) / 4)
            assert answer.status_code == 202, answer.text
            self.jobs[key] = answer.json()["id"]
            time.sleep(0.1)

    def _make(self) -> None:
        while not self._ended.is_set():
            self.made.append(self._post("/generate"))
            time.sleep(0.05)

    def _post(self, path: str, headers: dict[str, str] | None = None) -> httpx.Response:
        return self._client.post(path, json={"prompt": "rain", "duration": 2, "steps": 8}, headers=headers)


def test_server_that_is_stopped_under_load_loses_nothing(
    servers: Sequence[LaunchedServer], balanced: httpx.Client
) -> None:
    leaving, _ = servers
    with Load(balanced) as load:
        time.sleep(3)  # both have work
        leaving.stop()
        num_before = len(load.made)
        time.sleep(3)  # and one goes on
    assert {answer.status_code for answer in load.made} == {200}
    assert len(load.made) > num_before > 0
    jobs = [wait(balanced, job_id) for job_id in load.jobs.values()]
    assert len(set(load.jobs.values())) == len(jobs) > 10
    assert [job for job in jobs if job["status"] != "succeeded"] == []
    for job in jobs:
        assert httpx.get(job["download_url"]).raise_for_status().content.startswith(b"RIFF")
    for server in servers:
        server.wait_for_output("route=/generate status=200")  # NGINX gave work to each
    print(f"{len(load.made)} answers, {len(jobs)} jobs, {load.num_refused} told to come again")
