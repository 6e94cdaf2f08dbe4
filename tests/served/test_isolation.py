"""Other users of the machine cannot read, open or call anything of a server."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx
import pytest

from tests.patience import PATIENCE_S
from tests.serving.launched import LaunchedServer
from tests.serving.listeners import Listener, listeners_of

pytestmark = pytest.mark.server

_BODY = {"prompt": "a door closes", "duration": 1, "seed": 5, "steps": 1}
_TRY = """
import os, socket, sys
os.setgroups([])
os.setgid(65534)
os.setuid(65534)  # the user `nobody`, who may be unable to read the files of Python; Python has loaded them by now
for path in sys.argv[1:]:
    try:
        if os.path.isdir(path):
            os.listdir(path)
        else:
            socket.socket(socket.AF_UNIX).connect(path)
    except OSError as error:
        print(type(error).__name__)
    else:
        print("open")
"""


# For each gRPC service of Ray, a method that runs code or returns data. Each comment names the service's process.
_METHODS = (
    "ray.rpc.NodeInfoGcsService/GetAllNodeInfo",  # the control service of the cluster (GCS)
    "ray.rpc.NodeManagerService/GetNodeStats",  # the process that manages a node (raylet)
    "ray.rpc.ObjectManagerService/Pull",  # the object store of the raylet
    "ray.rpc.CoreWorkerService/PushTask",  # every Python process
    "ray.rpc.LogService/ListLogs",  # the node's agent
    "ray.serve.ASGIService/HandleRequest",  # calls between replicas
)
_OF_RAY = ("gcs_server", "raylet", "DashboardAgent", "RuntimeEnvAgent", "ServeController", "HAProxyManager")


@pytest.fixture(scope="module")
def used(server: LaunchedServer) -> LaunchedServer:
    """Make the server store a job, an upload and a file. Return the server."""
    job = server.client.post("/jobs", json=_BODY).json()
    with server.client.stream("GET", f"/jobs/{job['id']}/events") as events:
        events.read()
    assert server.client.get(f"/jobs/{job['id']}").json()["status"] == "succeeded"
    return server


def below(folder: Path) -> Iterator[tuple[Path, int]]:
    for path in folder.rglob("*"):
        try:
            mode = path.lstat().st_mode
        except FileNotFoundError:
            continue  # the running server has deleted the file since it was listed
        yield path, mode


def test_only_the_owner_can_open_folder_and_admin_socket(used: LaunchedServer) -> None:
    assert stat.S_IMODE(used.directory.stat().st_mode) == 0o700
    (admin,) = used.directory.glob("*/admin.sock")
    assert stat.S_IMODE(admin.stat().st_mode) == 0o600


def test_only_the_owner_can_read_jobs_and_their_files(used: LaunchedServer) -> None:
    outputs = Path(f"/proc/{used.process.pid}/cwd").resolve() / "outputs"
    names = {path.name for path, _ in below(outputs)}
    assert {"jobs.db", "jobs.db-wal", "jobs.db-shm"} <= names
    assert any(path.suffix == ".wav" for path, _ in below(outputs)), names
    for path, mode in [(outputs, outputs.stat().st_mode), *below(outputs)]:
        assert not stat.S_IMODE(mode) & 0o077, path


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may try things as another user")
def test_another_user_cannot_call_any_service(used: LaunchedServer) -> None:
    sockets = [path for path, mode in below(used.directory) if stat.S_ISSOCK(mode)]
    assert {"admin.sock", "plasma_store", "raylet"} <= {path.name for path in sockets}
    tried = subprocess.run(
        [sys.executable, "-I", "-S", "-c", _TRY, used.directory, *sockets],
        capture_output=True,
        text=True,
        check=True,
        timeout=PATIENCE_S,
    )
    assert set(tried.stdout.split()) == {"PermissionError"}


def test_other_machines_reach_only_calls_between_replicas(used: LaunchedServer) -> None:
    found = listeners_of([used.process.pid, *used.pids("")])
    assert {"haproxy", "raylet", "gcs_server", "ProxyActor"} <= {
        word for word in ("haproxy", "raylet", "gcs_server", "ProxyActor") for one in found if word in one.title
    }
    for one in found:
        assert one.is_local or one.title.startswith("ray::ServeReplica"), one
    num_replicas = len(used.pids("ray::ServeReplica"))
    assert sum(not one.is_local for one in found) <= num_replicas


def answer_without_token(listener: Listener) -> str:
    """Connect to a port without Ray's secret token.

    Returns "refused", "open", or "numbers" if the port only serves metrics.
    """
    host, port = listener.reachable_at
    try:
        reply = httpx.get(f"http://{host}:{port}/", timeout=PATIENCE_S)
    except httpx.HTTPError:
        return _answer_to_calls(f"{host}:{port}")
    if reply.status_code == 401:
        return "refused"
    return "numbers" if reply.text.startswith("# HELP") else "open"


def _answer_to_calls(address: str) -> str:
    codes = set()
    with grpc.insecure_channel(address) as channel:
        for method in _METHODS:
            try:
                channel.unary_unary(f"/{method}")(b"", timeout=PATIENCE_S)
            except grpc.RpcError as error:
                codes.add(error.code())
            else:
                return "open"
    return "refused" if grpc.StatusCode.UNAUTHENTICATED in codes else "open"


def test_ray_refuses_calls_without_its_token(used: LaunchedServer) -> None:
    of_ray = [one for one in listeners_of(used.pids("")) if any(word in one.title for word in _OF_RAY)]
    assert len(of_ray) >= len(_OF_RAY)
    assert {answer_without_token(one) for one in of_ray} == {"refused", "numbers"}
    between_replicas = [one for one in listeners_of(used.pids("ray::ServeReplica")) if not one.is_local]
    assert {answer_without_token(one) for one in between_replicas} == {"refused"}
