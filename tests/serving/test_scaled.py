"""Autoscaling on two Ray nodes: the number of replicas follows requests and waiting jobs.

Also tested: the server refuses settings that cannot work on two nodes. With `make soak`, there are many more jobs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from stable_audio_serve.launcher.start_timeouts import load_per_core, start_timeouts
from tests.patience import PATIENCE_S
from tests.serving.conftest import TINY

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.timeout(5 * PATIENCE_S)]

JOBS = int(os.environ.get("SOAK_JOBS", "100"))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, postgres: Any) -> dict[str, Any]:
    result = subprocess.run(
        [sys.executable, "-m", "tests.serving.scaled", TINY, postgres.create_database(), str(JOBS)],
        capture_output=True,
        text=True,
        cwd=tmp_path_factory.mktemp("scaled"),
        env=os.environ
        | start_timeouts(load_per_core())
        | {"PYTHONPATH": os.getcwd(), "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
        | {"HF_ENDPOINT": "http://127.0.0.1:9"},
        timeout=4 * PATIENCE_S,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (line,) = (line for line in result.stdout.splitlines() if line.startswith("results: "))
    return json.loads(line.removeprefix("results: "))


def test_load_scales_a_model_to_three_replicas_and_back(
    results: dict[str, Any],
) -> None:
    assert results["lazy"]["counts"][0] == 0
    assert max(results["lazy"]["counts"]) == 3
    assert results["lazy"]["counts"][-2:] == [0, 1]  # none without load, then one for one client
    assert results["lazy"]["nodes"] == 2
    assert list(results["outcomes"]) == ["ok"]


def test_waiting_jobs_alone_add_replicas(results: dict[str, Any]) -> None:
    counts = results["busy"]["counts"]
    assert (counts[0], max(counts), counts[-1]) == (1, 3, 1)
    assert results["jobs"] == {"succeeded": JOBS}


def test_steady_load_without_a_backlog_keeps_its_replicas(results: dict[str, Any]) -> None:
    assert len(results["steady"]) == 15
    assert min(results["steady"]) >= 2


def test_sqlite_is_refused_on_two_nodes_but_postgresql_is_not(results: dict[str, Any]) -> None:
    in_file, elsewhere = results["refused"]
    assert "2 nodes" in in_file
    assert "jobs.database_url" in in_file
    assert "nodes" not in elsewhere  # the error is only that this database cannot be reached


def test_reason_of_a_failed_deployment_follows_the_line_of_ray(results: dict[str, Any]) -> None:
    (_, missing), (_, unknown) = (message.splitlines() for message in results["failed"])
    assert missing.startswith("model lab: lab/model is not complete in")
    assert unknown == "modles: unknown; did you mean models?"
