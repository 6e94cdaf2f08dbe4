"""No process of a server that was just started needs much more memory for a long piece than for a short one."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.patience import wait_until
from tests.serving.launched import LaunchedServer, write_config

pytestmark = [pytest.mark.server, pytest.mark.slow]

MOST_GROWTH_MB = 20
SECTION_S = 30
PROCESSES = ("demo", "job-runner", "Ingress")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[LaunchedServer]:
    launched = LaunchedServer(write_config(tmp_path, {"models": [{"name": "demo"}]}))
    try:
        yield launched.wait_until_ready()
    finally:
        launched.stop(number=signal.SIGKILL)


def test_replicas_hold_no_more_after_twenty_minutes_than_after_one(server: LaunchedServer) -> None:
    with httpx.Client(base_url=server.url, timeout=None) as http:
        _make(http, minutes=1)
        after_one_mb = _held_mb(server)
        _make(http, minutes=20)
    growth_mb = {name: held - after_one_mb[name] for name, held in _held_mb(server).items()}
    print(f"memory after one minute {after_one_mb}, growth {growth_mb} (MB)")
    assert max(growth_mb.values()) <= MOST_GROWTH_MB


def _make(http: httpx.Client, *, minutes: int) -> None:
    sections = [{"duration": SECTION_S}] * (60 * minutes // SECTION_S)
    body = {"prompt": "house drum loop at 120 bpm", "seed": minutes, "sections": sections}
    path = http.post("/jobs", json=body).raise_for_status().json()["status_url"]
    wait_until(lambda: http.get(path).json()["status"] == "succeeded", every_s=0.3)


def _held_mb(server: LaunchedServer) -> dict[str, float]:
    """Return the memory of each replica, without mapped files and shared memory."""
    held = {}
    for name in PROCESSES:
        (pid,) = server.pids(f"ray::ServeReplica:audio:{name}")
        found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
        assert found is not None
        held[name] = int(found[1]) / 1024
    return held
