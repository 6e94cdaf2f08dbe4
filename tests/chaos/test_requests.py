"""If a process of the server is killed, running requests succeed or get a response with Retry-After."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest

from tests.chaos.killer import KINDS, Target
from tests.databases import PostgresServer
from tests.patience import wait_until
from tests.serving.conftest import TINY
from tests.serving.launched import LaunchedServer, write_config
from tests.serving.load import Load

pytestmark = pytest.mark.chaos

_IN_FLIGHT = 4  # number of requests that the load keeps running at once


@pytest.fixture(scope="module")
def server(postgres: PostgresServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LaunchedServer]:
    args = {
        "models": [
            {"name": "tiny", "path": TINY, "max_queue_s": 1e6, "replicas": {"min_replicas": 2, "max_replicas": 2}}
        ],
        "jobs": {"database_url": postgres.create_database(), "runners": 2, "lease_s": 5.0, "max_running": 2},
        "ingress": {"replicas": 2},
    }
    launched = LaunchedServer(write_config(tmp_path_factory.mktemp("server"), args))
    try:
        yield launched.wait_until_ready()
    finally:
        launched.stop()


def kill_one(server: LaunchedServer, target: Target) -> float:
    """Kill one process of this kind. Returns the seconds until the server again has all processes of the kind."""
    kind = KINDS[target]
    victim, *_ = server.pids(kind.title)
    os.kill(victim, signal.SIGKILL)
    began_at = time.monotonic()
    wait_until(lambda: len(set(server.pids(kind.title)) - {victim}) >= kind.number)
    return time.monotonic() - began_at


def loaded_while_killing(server: LaunchedServer, target: Target) -> Load:
    """Send requests and jobs while one process of this kind is killed. Returns the load."""
    with Load(server.client) as load:
        load.wait_for_progress()
        back_s = kill_one(server, target)
        load.wait_for_progress()
    print(f"{target} killed, another after {back_s:.1f} s: {load}")
    assert len(load.finished_jobs()) > 10
    return load


@pytest.mark.parametrize("target", ["engine", "runner", "controller"])
def test_killing_a_process_fails_no_request(server: LaunchedServer, target: Target) -> None:
    load = loaded_while_killing(server, target)
    assert load.failures == load.refusals == []


def test_requests_at_a_killed_ingress_get_a_retry_time(server: LaunchedServer) -> None:
    load = loaded_while_killing(server, "ingress")
    assert load.failures == []
    assert len(load.refusals) <= _IN_FLIGHT


def test_killed_haproxy_closes_connections_and_restarts_soon(server: LaunchedServer) -> None:
    """The running requests fail with a connection error.

    Only a load balancer in front of HAProxy could prevent that.
    """
    load = loaded_while_killing(server, "proxy")
    # All failures are connection errors, and none is a response with an error status.
    assert all("Error" in failure for failure in load.failures), load.failures
