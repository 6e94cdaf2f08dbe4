"""Processor time of a running server by what its processes are for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import psutil

_REPLICA = "ray::ServeReplica:"
_MODEL = "replicas"


def read_cpu_s(pid: int) -> dict[str, float]:
    """Returns the seconds used so far by the server that began with this process, by role."""
    used: dict[str, float] = defaultdict(float)
    for role, process in _processes(pid):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        used[role] += times.user + times.system
    return used


def replicas_use_torch(pid: int) -> bool:
    """Whether any replica of a model has torch's library loaded."""
    maps = (process.memory_maps() for role, process in _processes(pid) if role == _MODEL)
    return any("libtorch" in file.path for files in maps for file in files)


def role_of(command: str) -> str:
    """Returns what a process of a server is for, by its command line: `ingress`, `replicas`, `proxy` or `ray`."""
    if command.startswith(_REPLICA):
        name = command.split()[0].rpartition(":")[2]
        return {"Ingress": "ingress", "job-runner": "ray"}.get(name, _MODEL)
    return "proxy" if "haproxy" in command or command.startswith("ray::ProxyActor") else "ray"


def _processes(pid: int) -> Iterator[tuple[str, psutil.Process]]:
    first = psutil.Process(pid)
    for process in (first, *first.children(recursive=True)):
        try:
            yield role_of(" ".join(process.cmdline())), process
        except psutil.NoSuchProcess:
            continue
