"""Processes of the shared server are killed under load. This file must run last in its folder."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.patience import wait_until
from tests.served.conftest import OVER, make_body, submit, wait
from tests.serving.launched import LaunchedServer
from tests.serving.load import Load

pytestmark = pytest.mark.server


def kill(server: LaunchedServer, title: str) -> None:
    """Kill the only process of the server whose command line has `title`, and wait until Ray has replaced it."""
    (pid,) = server.pids(title)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: len(pids := server.pids(title)) == 1 and pids != [pid])


def test_killed_runner_and_replica_lose_nothing(server: LaunchedServer) -> None:
    body = make_body(steps=200, duration=4)
    alone = server.client.post("/generate", json=body)
    assert alone.status_code == 200
    with Load(server.client) as load, ThreadPoolExecutor(1) as pool:
        load.wait_for_progress()
        interrupted = submit(server, make_body(steps=300, duration=4))
        wait(server, interrupted, "running", *OVER)  # on a busy machine, the polls may miss that it runs
        kill(server, "ServeReplica:audio:job-runner")
        load.wait_for_progress()
        running = pool.submit(server.client.post, "/generate", json=body)
        kill(server, "ServeReplica:audio:tiny")
        load.wait_for_progress()
        answer = running.result()
    assert load.failures == []
    assert wait(server, interrupted)["status"] == "succeeded"
    assert len(load.finished_jobs()) >= 10
    assert answer.status_code == 200
    assert answer.content == alone.content
