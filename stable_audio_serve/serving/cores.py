"""Divides the CPU cores of this machine among the models.

Computes the number of threads of each model, from the settings and the number of cores. Also lowers the priority of
processes that run no model.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from stable_audio_serve.core.settings import ModelSettings, Settings
from stable_audio_serve.serving.placement import model_entry
from stable_audio_serve.serving.reservations import may_use_gpu

_NICENESS = 5
_SPARE_FROM = 4  # if there are at least this many cores, one core stays free for other processes


def choose_threads(settings: Settings, model: ModelSettings, *, device: str, cluster_gpus: float) -> int:
    """Return the number of CPU threads of a model's replica: the configured number, or an equal share of the cores.

    The share assumes that all replicas that compute on CPUs run on this machine. The demo model gets one thread. A
    model on a GPU also gets one thread, which only launches kernels.
    """
    if model.threads is not None:
        return model.threads
    if device != "cpu" or model_entry(model).card.is_demo:
        return 1
    on_cpu = [other for other in settings.models if not (cluster_gpus and may_use_gpu(settings, other))]
    num_replicas = sum(other.replicas.max_replicas for other in on_cpu)
    return share_cores(usable_cores(), num_replicas=num_replicas)


def share_cores(num_cores: int, *, num_replicas: int) -> int:
    """Return the number of threads of each replica if `num_replicas` share the cores equally: at least one.

    If there are four or more cores, one stays free.
    """
    spare = 1 if num_cores >= _SPARE_FROM else 0
    return max(1, (num_cores - spare) // max(1, num_replicas))


def usable_cores(root: Path = Path("/")) -> int:
    """Return the number of whole cores that CPU affinity and cgroup quotas allow this process, at least one."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min([allowed, *_quotas(root)])))


def _quotas(root: Path) -> Iterator[float]:
    """Yield the CPU quotas, in cores, of this process's cgroups (v1 or v2) and of their parent groups."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return  # the system is not Linux
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / (controllers and "cpu")
        group = mount / path.lstrip("/")
        for folder in (group, *group.parents):
            quota = _read_quota(folder)
            if quota is not None:
                yield quota
            if folder == mount:
                break


def _read_quota(folder: Path) -> float | None:
    """Return the CPU quota of one cgroup in cores, or None if the cgroup has no quota."""
    try:
        if (folder / "cpu.max").is_file():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError):  # there is no such file, or the quota is the text `max`
        return None


def yield_to_engines() -> None:
    """Lower the priority of all threads of this process, so that models on the same cores go first. Linux only.

    At normal priority, many short HTTP responses keep interrupting a long computation. While two cores sent 150
    responses a second, a generation took 1.2 times as long as without responses. With the lower priority, it took 1.1
    times as long.
    """
    if sys.platform != "linux":
        return
    for thread in map(int, os.listdir("/proc/self/task")):  # also the threads that Ray has started
        with suppress(ProcessLookupError):  # the thread has ended
            niceness = os.getpriority(os.PRIO_PROCESS, thread)
            os.setpriority(os.PRIO_PROCESS, thread, min(niceness + _NICENESS, 19))
