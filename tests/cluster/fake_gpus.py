"""Build applications on a Ray cluster with fake GPUs, in a separate process.

The process reads one request from each line of standard input. All tests share the process, because starting it takes
as long as a build. Each build has its own cluster.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stable_audio_serve.launcher.start_timeouts import load_per_core, start_timeouts
from tests.cluster.tools import ROOT
from tests.patience import PATIENCE_S

_MARK = "options:"
_ENVIRONMENT = {
    "HF_ENDPOINT": "http://127.0.0.1:9",  # unreachable, so that a download fails; all weights are local
    "RAY_prestart_worker_first_driver": "0",  # with 1, Ray would start an idle process for each CPU
}


class Builder:
    """Builds applications in a separate process, which runs until the context ends."""

    def __init__(self, log: Path) -> None:
        """Start the process. Its standard error goes to the file `log`."""
        self._log = log
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.cluster.fake_gpus"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                cwd=ROOT,
                env=os.environ | start_timeouts(load_per_core()) | _ENVIRONMENT,
            )

    def __enter__(self) -> Builder:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=PATIENCE_S)

    def build(
        self, args: Mapping[str, Any], *, nodes: Sequence[Mapping[str, int]], folder: Path, environ: Mapping[str, str]
    ) -> dict[str, dict[str, float]]:
        """Build an application, and return a dict for each of its deployments.

        The dict has the resources of a replica, and the smallest (`least`) and largest (`most`) number of replicas.
        `args` are the application's arguments. `nodes` has the resources of each node, the head node first. `folder` is
        the working directory of the build.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        assert self._process.poll() is None, self._log.read_text()  # the process may have ended during an earlier build
        order = {"args": args, "nodes": nodes, "folder": str(folder), "environ": environ}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith(_MARK):
                return json.loads(line.removeprefix(_MARK))
        raise AssertionError(self._log.read_text())


def main() -> None:
    """Build an application for each line of standard input, and print its deployments."""
    from stable_audio_serve.serving.app import build

    for line in sys.stdin:
        order = json.loads(line)
        with _started(order["nodes"]), _in_place(Path(order["folder"]), order["environ"]):
            options = {each.name: _resources(each) for each in _deployments(build(order["args"]))}
        print(_MARK + json.dumps(options), flush=True)


@contextmanager
def _started(nodes: Sequence[Mapping[str, int]]) -> Iterator[None]:
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={**nodes[0], "include_dashboard": False})
    try:
        for node in nodes[1:]:
            cluster.add_node(**node)
        ray.init(address=cluster.address, log_to_driver=False)
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()


@contextmanager
def _in_place(folder: Path, environ: Mapping[str, str]) -> Iterator[None]:
    before, variables = Path.cwd(), dict(os.environ)
    os.chdir(folder)
    os.environ.update(environ)
    try:
        yield
    finally:
        os.chdir(before)
        os.environ.clear()
        os.environ.update(variables)


def _deployments(value: Any) -> Iterator[Any]:
    """Yield every deployment in a nested value. A deployment that occurs several times is yielded several times."""
    if hasattr(value, "_bound_deployment"):
        yield value._bound_deployment
        yield from _deployments(value._bound_deployment.init_args)
    elif isinstance(value, Mapping):
        yield from _deployments(tuple(value.values()))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _deployments(each)


def _resources(deployment: Any) -> dict[str, float]:
    scaling = deployment._deployment_config.autoscaling_config
    return {
        **deployment.ray_actor_options,
        "least": scaling.min_replicas if scaling else deployment.num_replicas,
        "most": scaling.max_replicas if scaling else deployment.num_replicas,
    }


if __name__ == "__main__":
    main()
