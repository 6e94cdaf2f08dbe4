"""Builds the application of a config file on a Ray whose GPUs do not exist, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.cluster.tools import ROOT

_BUILD = """
import json, sys
from ray.cluster_utils import Cluster
import ray
nodes, args = json.loads(sys.argv[1]), json.loads(sys.argv[2])
cluster = Cluster(initialize_head=True, head_node_args=nodes[0])
for node in nodes[1:]:
    cluster.add_node(**node)
cluster.wait_for_nodes()
ray.init(address=cluster.address, log_to_driver=False)
from stable_audio_serve.serving.app import build
bound = []
def walk(value):
    if hasattr(value, "_bound_deployment"):
        deployment = value._bound_deployment
        bound.append(deployment)
        walk(list(deployment.init_args))
    elif isinstance(value, dict):
        walk(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for each in value:
            walk(each)
walk(build(args))
options = {}
for deployment in bound:
    scaling = deployment._deployment_config.autoscaling_config
    options[deployment.name] = {
        **deployment.ray_actor_options,
        "least": scaling.min_replicas if scaling else deployment.num_replicas,
        "most": scaling.max_replicas if scaling else deployment.num_replicas,
    }
print("options:" + json.dumps(options))
ray.shutdown()
cluster.shutdown()
"""


def build_on_fake_gpus(
    args: Mapping[str, Any], *, nodes: Sequence[Mapping[str, int]], folder: Path, environ: Mapping[str, str]
) -> dict[str, dict[str, float]]:
    """Returns per deployment the resources Ray reserves for a replica, and the `least` and `most` replicas.

    `args` are the application's, `nodes` the resources of the head node and of others.
    """
    result = subprocess.run(
        [sys.executable, "-c", _BUILD, json.dumps(nodes), json.dumps(args)],
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_ENDPOINT": "http://127.0.0.1:9"} | environ,
        timeout=120,
        check=False,
    )
    lines = [line for line in result.stdout.splitlines() if line.startswith("options:")]
    assert len(lines) == 1, result.stdout + result.stderr
    return json.loads(lines[0].removeprefix("options:"))
