"""Run NGINX and HAProxy with copies of the configurations in `cluster/load_balancer/`."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.cluster.tools import CLUSTER, find_program, run_program

FILES = {"nginx": "nginx.conf", "haproxy": "haproxy.cfg"}


def configured(name: str, folder: Path, *, ports: tuple[int, int], port: int, slow_s: float | None = None) -> Path:
    """Copy the load balancer's configuration to `folder`, and replace its addresses. Returns the path of the copy.

    `ports` are the servers' ports, and `port` is the load balancer's port. If `slow_s` is given, timeouts of 15 s are
    replaced by `slow_s`.
    """
    text = (CLUSTER / "load_balancer" / FILES[name]).read_text()
    for number, server_port in enumerate(ports, start=1):
        text = text.replace(f"server-{number}:8000", f"127.0.0.1:{server_port}")
    text = text.replace("/tmp/", f"{folder}/").replace("bind :8080", f"bind 127.0.0.1:{port}")
    text = text.replace("listen 8080;", f"listen 127.0.0.1:{port};")
    text = text if slow_s is None else text.replace(" 15s", f" {slow_s:g}s")
    path = folder / FILES[name]
    path.write_text(text)
    return path


def check(name: str, path: Path) -> subprocess.CompletedProcess[str]:
    """Check a configuration file with the load balancer's own program."""
    return run_program(name, "-t", "-c", path) if name == "nginx" else run_program(name, "-c", "-f", path)


def start(name: str, path: Path) -> subprocess.Popen[bytes]:
    """Start the load balancer. Its output goes to the file `log` in the folder of the configuration."""
    options = ["-g", "daemon off;", "-c"] if name == "nginx" else ["-db", "-f"]
    with (path.parent / "log").open("w") as log:
        return subprocess.Popen([find_program(name), *options, str(path)], stdout=log, stderr=log)
