"""What callers notice when one process of a server is killed while they wait: an answer, or when to come again."""

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

_IN_FLIGHT = 4  # callers


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
    """Returns the seconds until there are as many of its kind again."""
    kind = KINDS[target]
    victim, *_ = server.pids(kind.title)
    os.kill(victim, signal.SIGKILL)
    began_at = time.monotonic()
    wait_until(lambda: len(set(server.pids(kind.title)) - {victim}) >= kind.number)
    return time.monotonic() - began_at


def loaded_while_killing(server: LaunchedServer, target: Target) -> Load:
    """Judged for what holds whoever is killed: no job is lost."""
    with Load(server.client) as load:
        load.go_on()
        back_s = kill_one(server, target)
        load.go_on()
    print(f"{target} killed, another after {back_s:.1f} s: {load}")
    assert len(load.finished_jobs()) > 10
    return load


@pytest.mark.parametrize("target", ["engine", "runner", "controller"])
def test_nobody_notices(server: LaunchedServer, target: Target) -> None:
    load = loaded_while_killing(server, target)
    assert load.failures == load.told == []


def test_who_waits_at_a_killed_ingress_is_told_to_come_again(server: LaunchedServer) -> None:
    load = loaded_while_killing(server, "ingress")
    assert load.failures == []
    assert len(load.told) <= _IN_FLIGHT


def test_who_is_connected_to_a_killed_haproxy_is_cut_off_and_finds_another_soon(server: LaunchedServer) -> None:
    """Only a balancer in front can hide that. What fails meanwhile has no answer rather than a wrong one."""
    load = loaded_while_killing(server, "proxy")
    assert all("Error" in failure for failure in load.failures), load.failures  # of the connection, no status
