"""What several Ray nodes change: here two of them on one machine, as Ray's own tests start them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from stable_audio_serve.launcher.patience import crowding, start_limits
from tests.patience import PATIENCE_S
from tests.serving.conftest import TINY

pytestmark = pytest.mark.ray

_BUILD = """
import json, os, sys
from ray.cluster_utils import Cluster
import ray
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
other = cluster.add_node(num_cpus=1)
cluster.wait_for_nodes()
ray.init(address=cluster.address)
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ServeDeploySchema
from stable_audio_serve.core.settings import JobSettings, ModelSettings, Settings
from stable_audio_serve.serving.app import build
from tests.patience import wait_until
def wait_for_failure():
    has_failed = lambda status: status.status == "DEPLOY_FAILED" and status
    return wait_until(lambda: has_failed(serve.status().applications["audio"])).message
models = (ModelSettings(name="tiny", path=sys.argv[1]),)
for url in (None, "postgresql://somebody@nowhere.invalid/jobs"):
    try:
        build(Settings(models=models, jobs=JobSettings(database_url=url)))
        print("answer: none")
    except RayServeException as error:
        print("answer:", error)
cluster.remove_node(other)
serve.start(proxy_location="Disabled")
application = {"name": "audio", "import_path": "stable_audio_serve.serving.app:build"}
for args in ({"models": [{"name": "lab", "repo_id": "lab/model"}]}, {"modles": []}):
    schema = ServeDeploySchema.model_validate({"applications": [application | {"args": args}]})
    _get_global_client().deploy_apps(schema)
    print("deployed:", json.dumps(wait_for_failure()))
serve.shutdown()
ray.shutdown()
cluster.shutdown()
"""


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> str:
    result = subprocess.run(
        [sys.executable, "-c", _BUILD, TINY],
        capture_output=True,
        text=True,
        cwd=tmp_path_factory.mktemp("cluster"),
        env=os.environ | start_limits(crowding()) | {"PYTHONPATH": os.getcwd(), "HF_ENDPOINT": "http://127.0.0.1:9"},
        timeout=PATIENCE_S,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_sqlite_is_refused_on_two_nodes_and_postgresql_is_not_for_that(output: str) -> None:
    lines = [line for line in output.splitlines() if line.startswith("answer:")]
    assert len(lines) == 2, output
    assert "2 nodes" in lines[0]
    assert "jobs.database_url" in lines[0]
    assert "nodes" not in lines[1]  # whether that server can be reached is another question


def test_what_keeps_a_deployment_from_starting_is_the_first_line_after_the_one_of_ray(output: str) -> None:
    told = [json.loads(line.removeprefix("deployed:")) for line in output.splitlines() if line.startswith("deployed:")]
    (_, missing), (_, unknown) = (message.splitlines() for message in told)
    assert missing.startswith("model lab: lab/model is not complete in")
    assert unknown == "modles: unknown; did you mean models?"
