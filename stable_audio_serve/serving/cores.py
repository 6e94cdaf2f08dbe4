"""The CPU cores of this machine: how many threads a model uses, and the priority of processes that serve HTTP and jobs.

The number of threads follows a rule, never a timing.
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
_SPARE_FROM = 4  # with so many cores, one is left to everything else


def choose_threads(settings: Settings, model: ModelSettings, *, device: str, cluster_gpus: float) -> int:
    """Returns the operator's choice, else an equal share of the cores this process may use: as if all replicas that
    compute on a CPU were on this machine. 1 for the demo, and for models on a GPU, whose thread only feeds it."""
    if model.threads is not None:
        return model.threads
    if device != "cpu" or _is_demo(model):
        return 1
    on_cpu = [other for other in settings.models if not (cluster_gpus and may_use_gpu(settings, other))]
    num_replicas = sum(other.replicas.max_replicas for other in on_cpu)
    return share_cores(usable_cores(), num_replicas=num_replicas)


def share_cores(num_cores: int, *, num_replicas: int) -> int:
    """Returns the threads of each replica, at least one; of four cores or more, one stays free."""
    spare = 1 if num_cores >= _SPARE_FROM else 0
    return max(1, (num_cores - spare) // max(1, num_replicas))


def usable_cores(root: Path = Path("/")) -> int:
    """Returns the whole cores this process may use, at least one, by its affinity and its control groups' quotas."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min([allowed, *_quotas(root)])))


def _is_demo(model: ModelSettings) -> bool:
    return model_entry(model).card.is_demo


def _quotas(root: Path) -> Iterator[float]:
    """Yields the cores of every quota at or above this process's groups, of both versions of control groups."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return  # not Linux
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
    """Returns the cores of one group's quota, None where there is none."""
    try:
        if (folder / "cpu.max").is_file():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError):  # no such file, or the word max
        return None


def yield_to_engines() -> None:
    """Give this whole process less priority than models on the same cores; does nothing where threads have none.

    Many short answers otherwise keep interrupting one long computation: with 150 of them a second it took 1.2 times
    as long on two cores, and takes 1.1 times so.
    """
    if sys.platform != "linux":
        return
    for thread in map(int, os.listdir("/proc/self/task")):  # Ray has started some already
        with suppress(ProcessLookupError):  # it has ended
            niceness = os.getpriority(os.PRIO_PROCESS, thread)
            os.setpriority(os.PRIO_PROCESS, thread, min(niceness + _NICENESS, 19))
