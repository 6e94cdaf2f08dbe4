"""What several Ray nodes change: here two of them on one machine, as Ray's own tests start them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.serving.conftest import TINY

pytestmark = pytest.mark.ray

_BUILD = """
import os, sys
from ray.cluster_utils import Cluster
import ray
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
cluster.add_node(num_cpus=1)
cluster.wait_for_nodes()
ray.init(address=cluster.address)
from stable_audio_serve.core.errors import ConfigError
from stable_audio_serve.core.settings import JobSettings, ModelSettings, Settings
from stable_audio_serve.serving.app import build
models = (ModelSettings(name="tiny", path=sys.argv[1]),)
for url in (None, "postgresql://somebody@nowhere.invalid/jobs"):
    try:
        build(Settings(models=models, jobs=JobSettings(database_url=url)))
        print("answer: none")
    except ConfigError as error:
        print("answer:", error.message)
ray.shutdown()
cluster.shutdown()
"""


def test_sqlite_is_refused_on_two_nodes_and_postgresql_is_not_for_that(tmp_path: os.PathLike[str]) -> None:
    result = subprocess.run(
        [sys.executable, "-c", _BUILD, TINY],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.getcwd()},
        timeout=120,
        check=False,
    )
    lines = [line for line in result.stdout.splitlines() if line.startswith("answer:")]
    assert len(lines) == 2, result.stdout + result.stderr
    assert "2 nodes" in lines[0]
    assert "jobs.database_url" in lines[0]
    assert "nodes" not in lines[1]  # whether that server can be reached is another question
