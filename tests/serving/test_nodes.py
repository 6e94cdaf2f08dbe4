"""A cluster of Ray nodes with simulated GPUs loses nodes and processes. No request may fail.

The tests run in this order on one cluster, because starting a cluster takes as long as a test.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.databases import PostgresServer
from tests.patience import PATIENCE_S
from tests.serving.conftest import model
from tests.serving.launched import free_port
from tests.serving.load import Load
from tests.serving.redis_server import running_redis

pytestmark = [pytest.mark.server, pytest.mark.slow]

_AWAY_S = 5.0  # how long Ray's control service (GCS) does not run
_LONG, _CROWD = {"prompt": "rain", "duration": 2, "steps": 50}, 32


@dataclass
class Cluster:
    """Runs the program `nodes.py` in a child process. `do` sends a command to it and returns its answer."""

    process: subprocess.Popen[str]
    client: httpx.Client
    args: dict[str, Any]
    log: Path

    def do(self, *command: Any) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.log.read_text()[-5000:]
        return json.loads(line)

    def deploy(self, **changed: Any) -> None:
        """Deploy the application again, with these settings of its model changed."""
        self.args["models"][0] |= changed
        self.do("deploy", self.args)

    def replicas(self, deployment: str) -> dict[str, str]:
        """Return the running replicas of a deployment: replica id -> node id."""
        found = self.do("status")["deployments"].get(deployment, [])
        return {each["replica_id"]: each["node_id"] for each in found if each["state"] == "RUNNING"}

    def wait(self, condition: Callable[[], bool]) -> float:
        """Wait until the condition is true. Return the seconds that this took."""
        began_at = time.monotonic()
        while not condition():
            assert time.monotonic() - began_at < PATIENCE_S, (self.do("status"), self.log.read_text()[-5000:])
            time.sleep(0.25)
        return time.monotonic() - began_at

    def is_running(self) -> bool:
        return bool(self.do("status")["status"] == "RUNNING")

    def answers(self) -> bool:
        """Return whether the server answers requests through HAProxy."""
        with suppress(httpx.TransportError):
            return self.client.get("/ready").status_code == 200
        return False


@pytest.fixture(scope="module")
def cluster(postgres: PostgresServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Run three nodes: the head, with the HTTP processes, and two with a simulated GPU and a model replica each.

    Ray chooses the nodes of the two job runners.
    """
    folder, port = tmp_path_factory.mktemp("nodes"), free_port()
    tiny = model("tiny", device="cpu", num_gpus=1, num_cpus=0, threads=1)
    replicas = {"min_replicas": 2, "max_replicas": 2}
    args = {
        "models": [{**tiny, "max_queue_s": 1e6, "replicas": replicas}],
        "jobs": {"database_url": postgres.create_database(), "runners": 2, "lease_s": 5.0, "max_running": 2},
        "ingress": {"replicas": 2, "num_cpus": 1},  # only the head has CPUs, and no test kills it
        "output_dir": str(folder / "outputs"),
    }
    with (
        running_redis(folder) as redis,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_S) as client,
        (folder / "log").open("w") as log,
    ):
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.serving.nodes", str(port)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "RAY_REDIS_ADDRESS": redis},
            start_new_session=True,
        )
        try:
            cluster = Cluster(process, client, args, folder / "log")
            assert cluster.answer() == "ready"
            cluster.do("add", 2)
            cluster.do("start_serve")
            cluster.deploy()
            cluster.wait(lambda: cluster.is_running() and cluster.answers())
            yield cluster
            cluster.do("stop")
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # the launcher's guard process ends Ray's processes
            process.wait()


def check_load(load: Load, what: str) -> None:
    """Check that no request of the load has failed and that every accepted job has succeeded. Print the load."""
    assert load.failures == load.refusals == []
    jobs = load.finished_jobs()
    assert len(load.times_s) > 10
    assert len(jobs) > 10
    print(f"{what}: {load}")


@pytest.mark.chaos
def test_update_under_load_fails_no_request(cluster: Cluster) -> None:
    """The update must replace both replicas, although the two nodes have no room for a third one."""
    before = {name: cluster.replicas(name) for name in ("tiny", "Ingress", "job-runner")}
    with Load(cluster.client) as load:
        load.wait_for_progress()
        cluster.deploy(max_queue_s=1e5)
        took_s = cluster.wait(
            lambda: (
                cluster.is_running()
                and all(
                    not before[name].keys() & (now := cluster.replicas(name)).keys() and len(now) == 2
                    for name in before
                )
            )
        )
        load.wait_for_progress()
    check_load(load, f"update, {took_s:.0f} s")
    assert len(set(cluster.replicas("tiny").values())) == 2


@pytest.mark.chaos
def test_restarted_head_restores_its_state_from_redis(cluster: Cluster) -> None:
    """While Ray's control service is down, requests are still answered. Afterwards Ray can start replicas again."""
    before = cluster.replicas("tiny")
    ready: Counter[int] = Counter()
    with Load(cluster.client) as load:
        load.wait_for_progress()
        cluster.do("kill_gcs")
        until = time.monotonic() + _AWAY_S
        while time.monotonic() < until:
            ready[cluster.client.get("/ready").status_code] += 1
            ready[cluster.client.get("/health").status_code] += 1
            time.sleep(0.5)
        cluster.do("start_gcs")
        cluster.wait(cluster.is_running)
        assert cluster.replicas("tiny") == before
        cluster.do("add", 1)
        cluster.deploy(replicas={"min_replicas": 2, "max_replicas": 3, "upscale_delay_s": 0.5, "target_wait_s": 0.1})
        with ThreadPoolExecutor(_CROWD) as crowd:
            answers = [crowd.submit(cluster.client.post, "/generate", json=_LONG) for _ in range(_CROWD)]
            took_s = cluster.wait(lambda: len(cluster.replicas("tiny")) == 3)
    assert {answer.result().status_code for answer in answers} == {200}
    assert set(ready) == {200}
    check_load(load, f"GCS away for {_AWAY_S:g} s, a third replica after {took_s:.0f} s of more load")


@pytest.mark.chaos
def test_replicas_leave_a_drained_node_before_it_stops(cluster: Cluster) -> None:
    """Another node has room, so a new replica starts there first. The old replica stops when its work is done."""
    cluster.do("add", 1)
    cluster.wait(lambda: cluster.is_running() and len(cluster.replicas("tiny")) >= 2)
    num_replicas = len(cluster.replicas("tiny"))
    victim = max(cluster.replicas("tiny").values())
    least = num_replicas

    def has_left() -> bool:
        nonlocal least
        least = min(least, len(cluster.replicas("tiny")))
        return not cluster.do("is_alive", victim)

    with Load(cluster.client) as load:
        load.wait_for_progress()
        cluster.do("drain_node", victim)
        took_s = cluster.wait(has_left)
        load.wait_for_progress()
    check_load(load, f"node drained, gone after {took_s:.0f} s, {least} of {num_replicas} replicas at least")
    cluster.wait(lambda: len(cluster.replicas("tiny")) == num_replicas)
    assert victim not in cluster.replicas("tiny").values()


def test_killed_node_fails_no_request_and_is_replaced(cluster: Cluster) -> None:
    """All processes of a node are killed at once: a replica with running requests, and perhaps a job runner."""
    cluster.deploy(replicas={"min_replicas": 2, "max_replicas": 2})
    cluster.do("add", 1)  # a node for the replica that replaces the killed one
    cluster.wait(lambda: cluster.is_running() and len(cluster.replicas("tiny")) == 2)
    runners = set(cluster.replicas("job-runner").values())
    victim = max(cluster.replicas("tiny").values(), key=lambda node: node in runners)
    with Load(cluster.client) as load:
        load.wait_for_progress()
        began_at = time.monotonic()
        num_killed = cluster.do("kill_node", victim)
        cluster.wait(
            lambda: (
                cluster.is_running()
                and all(
                    len(now := cluster.replicas(name)) == 2 and victim not in now.values()
                    for name in ("tiny", "job-runner")
                )
            )
        )
        took_s = time.monotonic() - began_at
        load.wait_for_progress()
    check_load(load, f"{num_killed} processes killed, full strength after {took_s:.0f} s")
