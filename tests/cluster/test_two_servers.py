"""NGINX and HAProxy with our configurations, in front of two real servers that share a database and a bucket.

The second server runs where many programs fail: the paths of Python and of the configuration have spaces, and the
locale is ASCII.
"""

from __future__ import annotations

import sysconfig
import venv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.cluster.balancers import configured, start
from tests.databases import PostgresServer
from tests.object_storage import ObjectStorage
from tests.patience import wait_until
from tests.serving.conftest import model
from tests.serving.launched import LaunchedServer, command, free_port, write_config
from tests.serving.load import Load, finished

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def servers(
    postgres: PostgresServer, _object_storage: ObjectStorage, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Sequence[LaunchedServer]]:
    args = {
        "models": [model("tiny", max_queue_s=1e6)],
        "jobs": {"database_url": postgres.create_database(), "lease_s": 5.0, "max_running": 2},
    }
    environment = _object_storage.environ(_object_storage.make_bucket())
    spaced = tmp_path_factory.mktemp("my server (2)")
    started = [
        LaunchedServer(write_config(tmp_path_factory.mktemp("server"), args), environment=environment),
        LaunchedServer(
            config := write_config(spaced, args),
            environment=environment | {"LC_ALL": "C", "PYTHONUTF8": "0"},
            program=[str(install_python(spaced)), *command(config)[1:]],
        ),
    ]
    try:
        yield [server.wait_until_ready() for server in started]
    finally:
        for server in started:
            if server.process.poll() is None:
                server.stop()


def install_python(folder: Path) -> Path:
    """Make a virtual environment in `folder` that has the packages of this one, and return its Python."""
    venv.create(folder / "venv", symlinks=True)
    (packages,) = (folder / "venv").glob("lib/python*/site-packages")
    (packages / "all.pth").write_text(sysconfig.get_path("purelib"))
    return folder / "venv" / "bin" / "python"


@contextmanager
def balancing(name: str, servers: Sequence[LaunchedServer], folder: Path) -> Iterator[httpx.Client]:
    """Run a load balancer for these two servers. Yields a client of the balancer."""
    port = free_port()
    first, second = (server.port for server in servers)
    (folder / name).mkdir()
    process = start(name, configured(name, folder / name, ports=(first, second), port=port))
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            wait_until(lambda: is_ready(client))
            yield client
    finally:
        process.terminate()
        process.wait(30)


def is_ready(client: httpx.Client) -> bool:
    try:
        # Before HAProxy has checked its servers, it responds with an error.
        return client.get("/ready").status_code == 200
    except httpx.TransportError:
        return False


def test_job_of_one_server_is_readable_from_the_other(servers: Sequence[LaunchedServer]) -> None:
    one, other = servers
    body = {"prompt": "rain", "duration": 2, "steps": 2, "seed": 1}
    job_id = one.client.post("/jobs", json=body).raise_for_status().json()["id"]
    job = finished(other.client, job_id)
    made = other.client.post("/generate", json=body | {"model": "tiny"}).raise_for_status()
    assert httpx.get(job["download_url"]).raise_for_status().content == made.content
    assert {job["id"] for job in other.client.get("/jobs").json()["jobs"]} >= {job_id}


@pytest.mark.parametrize("balancer", ["nginx", "haproxy"])
def test_recipe_of_a_long_prompt_passes_the_balancer(
    servers: Sequence[LaunchedServer], balancer: str, tmp_path: Path
) -> None:
    body = {"prompt": "rain " * 650, "duration": 1, "steps": 1, "seed": 1}
    with balancing(balancer, servers, tmp_path) as client:
        answer = client.post("/v1/audio/generations", json=body).raise_for_status()
    assert 3250 < len(answer.headers["X-Recipe"]) <= 4096


def test_server_stopped_under_load_loses_nothing(servers: Sequence[LaunchedServer], tmp_path: Path) -> None:
    """Each load balancer has its own clients. Only submissions of jobs may be refused. Clients repeat refused ones."""
    leaving, _ = servers
    with balancing("nginx", servers, tmp_path) as one, balancing("haproxy", servers, tmp_path) as other:
        with Load(one) as by_nginx, Load(other) as by_haproxy:
            by_nginx.wait_for_progress()
            by_haproxy.wait_for_progress()
            leaving.stop()
            by_nginx.wait_for_progress()  # now with one server
            by_haproxy.wait_for_progress()
        for load in (by_nginx, by_haproxy):
            print(load)
            assert load.failures == []
            assert all(refusal.startswith("/jobs: ") for refusal in load.refusals), load.refusals
            jobs = load.finished_jobs()
            assert len(jobs) > 10
            for job in jobs:
                assert httpx.get(job["download_url"]).raise_for_status().content.startswith(b"RIFF")
    for server in servers:
        server.wait_for_output("route=/generate status=200")
