"""A program that runs several Ray nodes with simulated GPUs on this machine, and a server on them.

Only the first node has CPUs, so the HTTP processes and HAProxy run there. They have the configuration that
`stable-audio-serve serve` would give them. The models run on the other nodes. Each line of standard input is a JSON
list: the name of a method of `Nodes` and its arguments. The program answers each line with the method's result as JSON.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from contextlib import ExitStack, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import psutil

from stable_audio_serve.core.settings import Settings
from stable_audio_serve.launcher import environment
from stable_audio_serve.launcher.embedded import apply_environment, private_directory
from stable_audio_serve.launcher.start_timeouts import load_per_core, start_timeouts

APPLICATION = "audio"


class Nodes:
    """Operations on the cluster, which tests call by name. Their arguments and results are JSON."""

    def __init__(self, directory: Path, *, port: int) -> None:
        from ray.cluster_utils import Cluster

        self._port = port
        # Ray's Cluster writes the head's address to this folder, whatever `temp_dir` is, but does not create it.
        Path(tempfile.gettempdir(), "ray").mkdir(exist_ok=True)
        temporary = str(directory / "ray")
        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "temp_dir": temporary})

    def add(self, number: int) -> None:
        """Start `number` more nodes, each with one simulated GPU."""
        for _ in range(number):
            self._cluster.add_node(num_cpus=0, num_gpus=1, wait=False)
        self._cluster.wait_for_nodes()

    def start_serve(self) -> None:
        import ray
        from ray import serve

        ray.init(address=self._cluster.address, log_to_driver=True)
        serve.start(proxy_location="HeadOnly", http_options={"host": environment.LOOPBACK, "port": self._port})

    def deploy(self, args: dict[str, Any]) -> None:
        """Deploy the application with these arguments, as `serve deploy` does."""
        from ray.serve.context import _get_global_client
        from ray.serve.schema import ServeDeploySchema

        application = {"name": APPLICATION, "import_path": "stable_audio_serve.serving.app:build", "args": args}
        config = {
            "proxy_location": "HeadOnly",
            "http_options": {"host": environment.LOOPBACK, "port": self._port},
            "applications": [application | {"route_prefix": "/"}],
        }
        _get_global_client().deploy_apps(ServeDeploySchema.model_validate(config), _blocking=False)

    def status(self) -> dict[str, Any]:
        """Return the application's status and, for each deployment, its replicas: state, id, node and process id."""
        from ray.serve.context import _get_global_client

        found = _get_global_client().get_serve_details()["applications"].get(APPLICATION)
        if found is None:
            return {"status": "NOT_STARTED", "message": "", "deployments": {}}
        deployments = {
            name: [
                {key: replica.get(key) for key in ("state", "replica_id", "node_id", "pid")}
                for replica in each["replicas"]
            ]
            for name, each in found["deployments"].items()
        }
        return {"status": found["status"], "message": found["message"], "deployments": deployments}

    def kill_node(self, node_id: str) -> int:
        """Kill all Ray processes of a node at once. Returns the number of killed processes."""
        (node,) = (each for each in self._cluster.worker_nodes if each.node_id == node_id)
        started = [each.process.pid for group in node.all_processes.values() for each in group]
        victims = {pid: psutil.Process(pid) for pid in started if psutil.pid_exists(pid)}
        for process in list(victims.values()):
            victims |= {child.pid: child for child in process.children(recursive=True)}
        for pid in victims:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._cluster.remove_node(node, allow_graceful=False)
        return len(victims)

    def drain_node(self, node_id: str) -> None:
        """Make Ray move work away from a node. Our Kubernetes pods do this before they stop (see `cluster/kuberay`)."""
        arguments = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "the pod stops"]
        ray = [sys.executable, "-m", "ray.scripts.scripts", "drain-node"]
        subprocess.run([*ray, "--address", self._cluster.address, "--node-id", node_id, *arguments], check=True)

    def is_alive(self, node_id: str) -> bool:
        import ray

        return any(node["Alive"] for node in ray.nodes() if node["NodeID"] == node_id)

    def kill_gcs(self) -> None:
        """Kill Ray's control service (GCS) on the first node, as if its machine had failed."""
        self._cluster.head_node.kill_gcs_server()

    def start_gcs(self) -> None:
        self._cluster.head_node.start_gcs_server()

    def stop(self) -> None:
        import ray
        from ray import serve

        serve.shutdown()
        ray.shutdown()
        self._cluster.shutdown()


def main(port: int) -> None:
    with ExitStack() as stack:
        directory = stack.enter_context(private_directory())
        ports = stack.enter_context(environment.claim_ports(environment.LOOPBACK))
        settings = Settings()
        variables = environment.base_environment(settings)
        variables |= environment.haproxy_environment(ports, directory, host=environment.LOOPBACK, settings=settings)
        apply_environment(variables, defaults=start_timeouts(load_per_core()))
        nodes = Nodes(directory, port=port)
        print(json.dumps("ready"), file=sys.__stdout__, flush=True)
        for line in sys.stdin:
            name, *arguments = json.loads(line)
            try:
                answer = getattr(nodes, name)(*arguments)
            except Exception:  # noqa: BLE001  # printed at once, because the process exits
                traceback.print_exc()
                os._exit(1)  # the launcher's guard process ends Ray's processes
            print(json.dumps(answer), file=sys.__stdout__, flush=True)


if __name__ == "__main__":
    with redirect_stdout(sys.stderr):  # the test reads answers from standard output, so logs must not appear there
        main(int(sys.argv[1]))
