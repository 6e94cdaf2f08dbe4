"""Checks that do not depend on models: Python, torch, GPUs, ports, HAProxy, and the stores of jobs and files."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.utils import collect_env

from stable_audio_serve.core.errors import ConfigError
from stable_audio_serve.core.settings import Settings
from stable_audio_serve.doctor.findings import Finding
from stable_audio_serve.engine.hardware.device import free_and_total
from stable_audio_serve.jobs.open import open_artifacts, open_store
from stable_audio_serve.launcher import environment
from stable_audio_serve.models.families import resolve_device
from stable_audio_serve.serving import haproxy
from stable_audio_serve.serving.cores import usable_cores
from stable_audio_serve.serving.serve_file import ServeFile

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_MOSTLY_FREE = 0.9  # share of a GPU's memory; a desktop or a small program takes the rest


def check_python() -> Iterator[Finding]:
    """Report Python, the operating system, cores and memory."""
    version, system = platform.python_version(), f"{platform.system()} {platform.machine()}"
    message = f"{version} on {system}, {usable_cores()} cores, {memory_bytes() / 1e9:.1f} GB of memory"
    yield Finding("Python", "ok", message)


def memory_bytes() -> int:
    """Return the memory that this machine, or this container, has."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(total, int(_CGROUP_LIMIT.read_text()))
    except (OSError, ValueError):  # not Linux, or the limit is `max`
        return total


def check_torch() -> Iterator[Finding]:
    """Report the versions of torch, CUDA and the NVIDIA driver. Warns if torch cannot use the driver."""
    driver = collect_env.get_nvidia_driver_version(collect_env.run)
    message = f"{torch.__version__}, CUDA {torch.version.cuda or 'not built in'}, NVIDIA driver {driver or 'not found'}"
    is_used = driver is None or torch.cuda.is_available()
    advice = None if is_used else "to use the GPU, install a build of torch with a CUDA that this driver supports"
    yield Finding("torch", "ok" if is_used else "warning", message, advice)


def check_gpu(index: int) -> Iterator[Finding]:
    """Report a GPU and its memory, and run a kernel on it. Warns if other programs hold its memory."""
    facts = torch.cuda.get_device_properties(index)
    free, total = free_and_total(index)
    message = (
        f"{facts.name}, compute capability {facts.major}.{facts.minor}, {total / 1e9:.1f} GB, {free / 1e9:.1f} free"
    )
    is_free = free >= _MOSTLY_FREE * total
    advice = None if is_free else "other programs hold memory of this GPU; nvidia-smi lists them"
    yield Finding(f"GPU {index}", "ok" if is_free else "warning", message, advice)
    resolve_device(f"cuda:{index}")  # raises if this build of torch has no code for this GPU


def check_ports(file: ServeFile, settings: Settings) -> Iterator[Finding]:
    """Check that the server's port and the configured port of the metrics are free."""
    metrics = settings.metrics
    environment.require_free_ports(file.host, file.port, metrics_host=metrics.host, metrics_port=metrics.port)
    yield Finding("ports", "ok", f"{file.port} of {file.host} is free")
    if metrics.port is not None:
        yield Finding("ports", "ok", f"{metrics.port} of {metrics.host} is free for metrics")


def check_job_store(settings: Settings) -> Iterator[Finding]:
    """Check that the job database can be used, without changing it."""
    database = open_store(settings).database
    try:
        if database.is_sqlite and _can_be_created(Path(database.url.database or "")):
            yield Finding("job store", "ok", f"{database} can be created")
        else:
            database.rehearse()
            yield Finding("job store", "ok", f"{database} can be written")
    finally:
        database.close()


def check_files(settings: Settings) -> Iterator[Finding]:
    """Check the bucket or the folder for files of jobs: write, read and delete a file.

    A folder that does not exist is not created. Instead, check that it can be created.
    """
    artifacts = open_artifacts(settings)
    if settings.storage.bucket is None and _can_be_created(Path(settings.output_dir)):
        yield Finding("files of jobs", "ok", f"{artifacts} can be created")
    else:
        artifacts.check()
        yield Finding("files of jobs", "ok", f"{artifacts} can be written and read")


def _can_be_created(path: Path) -> bool:
    """Return False if `path` exists, and True if it can be created. Raises ConfigError if it cannot be created."""
    if path.exists():
        return False
    folder = next(folder for folder in path.absolute().parents if folder.exists())
    if not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        raise ConfigError(f"{path} cannot be created: {folder} is no folder that this user may write to")
    return True


def check_haproxy(settings: Settings) -> Iterator[Finding]:
    """Check that HAProxy runs and that there are ports for it. If `proxy.kind` is python, only report that."""
    if settings.proxy.kind == "python":
        yield Finding("HAProxy", "ok", "not used, because proxy.kind is python")
    elif (problem := environment.haproxy_problem()) is None:
        with environment.claim_ports(settings.metrics.host):
            yield Finding("HAProxy", "ok", f"{haproxy.find_binary()} runs")
    elif settings.proxy.kind == "haproxy":
        yield Finding("HAProxy", "failure", problem, "install HAProxy, or set proxy.kind to auto or python")
    else:
        yield Finding("HAProxy", "warning", problem, "install HAProxy; until then the server uses Ray's Python proxy")
