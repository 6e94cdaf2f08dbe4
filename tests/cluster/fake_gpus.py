"""Builds applications on a Ray whose GPUs do not exist: a process of its own, which a `Builder` gives one order a line.

One for all, because to start it takes as long as to build; each order has a Ray of its own.
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
    "HF_ENDPOINT": "http://127.0.0.1:9",  # nobody: all weights are here
    "RAY_prestart_worker_first_driver": "0",  # a process per CPU, of which none has anything to do
}


class Builder:
    """The process, while the context lasts."""

    def __init__(self, said: Path) -> None:
        """What it says besides its answers goes to the file `said`."""
        self._said = said
        with said.open("w") as errors:
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
        """Returns per deployment the resources Ray reserves for a replica, and the `least` and `most` replicas.

        `args` are the application's, `nodes` the resources of the head node and of others; it is built in `folder`.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        assert self._process.poll() is None, self._said.read_text()  # an order before this one ended it
        order = {"args": args, "nodes": nodes, "folder": str(folder), "environ": environ}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith(_MARK):
                return json.loads(line.removeprefix(_MARK))
        raise AssertionError(self._said.read_text())


def main() -> None:
    """Answer orders until there are no more."""
    from stable_audio_serve.serving.app import build

    for line in sys.stdin:
        order = json.loads(line)
        with _started(order["nodes"]), _in_place(Path(order["folder"]), order["environ"]):
            options = {each.name: _asked(each) for each in _deployments(build(order["args"]))}
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
    """Returns every deployment that is bound in `value`, each as often as it is."""
    if hasattr(value, "_bound_deployment"):
        yield value._bound_deployment
        yield from _deployments(value._bound_deployment.init_args)
    elif isinstance(value, Mapping):
        yield from _deployments(tuple(value.values()))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _deployments(each)


def _asked(deployment: Any) -> dict[str, float]:
    scaling = deployment._deployment_config.autoscaling_config
    return {
        **deployment.ray_actor_options,
        "least": scaling.min_replicas if scaling else deployment.num_replicas,
        "most": scaling.max_replicas if scaling else deployment.num_replicas,
    }


if __name__ == "__main__":
    main()
