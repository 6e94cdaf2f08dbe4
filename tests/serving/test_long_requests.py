"""A request may take as long as `api.max_deadline_s`, even if other processes of the server are replaced meanwhile."""

from __future__ import annotations

import csv
import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
import ray
import yaml

from stable_audio_serve.core.settings import Settings
from stable_audio_serve.serving.app import assemble
from stable_audio_serve.serving.preflight import check_proxy
from tests.cluster.tools import CLUSTER
from tests.patience import PATIENCE_S, wait_until
from tests.serving.conftest import model
from tests.serving.launched import LaunchedServer, write_config
from tests.serving.slow_app import WAIT_S

LONGEST_S = int(Settings().api.max_deadline_s)
TIMES = {"RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(LONGEST_S)}


def test_cluster_files_allow_the_longest_request() -> None:
    dockerfile = (CLUSTER / "Dockerfile").read_text()
    assert TIMES.items() <= dict(re.findall(r"^ +(\w+)=(\S+)", dockerfile, flags=re.MULTILINE)).items()
    environment = yaml.safe_load((CLUSTER / "kuberay" / "base" / "environment.yaml").read_text())
    assert not TIMES.keys() & environment["data"].keys()  # the value of the image applies
    balancers = CLUSTER / "load_balancer"
    assert f"timeout server {LONGEST_S}s\n" in (balancers / "haproxy.cfg").read_text()
    assert f"proxy_read_timeout {LONGEST_S}s;" in (balancers / "nginx.conf").read_text()


def test_shorter_hard_stop_in_the_environment_warns() -> None:
    warnings: list[str] = []
    for environ in ({}, TIMES, TIMES | {"RAY_SERVE_ENABLE_HA_PROXY": "1"}):
        check_proxy(Settings(), environ, print_error=warnings.append)
    assert warnings == []
    check_proxy(Settings(), {"RAY_SERVE_ENABLE_HA_PROXY": "1"}, print_error=warnings.append)
    assert len(warnings) == 1
    assert "ends requests after 120 s" in warnings[0]
    assert "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S" in warnings[0]


def test_application_warns_of_a_shorter_hard_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 2.0}}])
    monkeypatch.setattr(ray, "cluster_resources", dict)
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "1")
    monkeypatch.delenv("RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S", raising=False)
    assemble({"models": [{"name": "demo"}], "output_dir": str(tmp_path)}, replica=object)
    assert "HAProxy ends requests after 120 s" in caplog.text


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LaunchedServer]:
    args = {"models": [model("tiny", max_queue_s=1e6)], "ingress": {"replicas": 3}}
    config = write_config(tmp_path_factory.mktemp("server"), args)
    config.write_text(config.read_text().replace("stable_audio_serve.serving.app", "tests.serving.slow_app"))
    launched = LaunchedServer(config)
    try:
        yield launched.wait_until_ready()
    finally:
        launched.stop(number=signal.SIGKILL)


def ingresses(server: LaunchedServer) -> list[int]:
    return server.pids("ServeReplica:audio:Ingress")


def busy_port(server: LaunchedServer) -> int | None:
    """Return the port of the HTTP process that has a running request, as HAProxy's statistics say.

    Returns None if no process or more than one process has a running request.
    """
    with socket.socket(socket.AF_UNIX) as admin:
        (path,) = server.directory.rglob("admin.sock")
        admin.connect(str(path))
        admin.sendall(b"show stat\n")
        rows = csv.DictReader(admin.makefile().read().removeprefix("# ").splitlines())
    ports = [int(row["addr"].rpartition(":")[2]) for row in rows if row["addr"] and row["scur"] == "1"]
    return ports[0] if len(ports) == 1 else None


def listens_on(pid: int, port: int) -> bool:
    return any(
        each.laddr.port == port for each in psutil.Process(pid).net_connections("tcp") if each.status == "LISTEN"
    )


@pytest.mark.slow
@pytest.mark.server
def test_request_survives_rescaling_and_a_redeploy(server: LaunchedServer) -> None:
    with httpx.Client(base_url=server.url, timeout=PATIENCE_S) as client, ThreadPoolExecutor(1) as pool:
        assert client.get("/health").status_code == 200  # the client keeps this connection open
        before = ingresses(server)
        began_at = time.monotonic()
        body = {"prompt": "a door closes", "duration": 2, "seed": 5, "steps": 3, "deadline_s": 3600}
        waiting = pool.submit(client.post, "/generate", json=body)
        port = wait_until(lambda: busy_port(server))
        idle = next(pid for pid in before if not listens_on(pid, port))
        os.kill(idle, signal.SIGKILL)
        wait_until(lambda: len(set(ingresses(server)) - {idle}) == 3)
        for program, *arguments in (
            ("tests.serving.rescale", "Ingress", "1"),
            ("tests.serving.redeploy", '{"max_queue_s": 1e5}'),
        ):
            with server.look_inside(program, *arguments) as changing:
                assert changing.wait(timeout=PATIENCE_S) == 0
        wait_until(lambda: len(server.pids("ServeReplica:audio:tiny")) == 2)  # the old one still runs the request
        # More than 120 s of the request are left. Without our settings, HAProxy would cut it off in this time.
        assert time.monotonic() - began_at < WAIT_S - 120
        answer = waiting.result()
    assert answer.status_code == 200, answer.text
    assert time.monotonic() - began_at >= WAIT_S
