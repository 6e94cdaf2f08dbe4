"""Runs all checks of a configuration, in the order in which a server needs them when it starts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from stable_audio_serve.api.middleware.key_ring import check_key_file
from stable_audio_serve.core.settings import Settings
from stable_audio_serve.core.settings_sources import load_settings
from stable_audio_serve.doctor import machine
from stable_audio_serve.doctor.findings import Finding, run_check
from stable_audio_serve.doctor.models import ModelChecks, check_shared_memory
from stable_audio_serve.serving.placement import Plan, plan_deployments
from stable_audio_serve.serving.preflight import check_proxy
from stable_audio_serve.serving.reservations import Slot, check_gpu_shares, require_room
from stable_audio_serve.serving.serve_file import (
    PACKAGED_FILE,
    ServeFile,
    deploy_schema,
    find_serve_file,
    read_serve_file,
)


class Examination:
    """The checks of one machine and one configuration.

    `settings` and `plan` are None until `run` has read the configuration.
    """

    def __init__(self, path: Path | None) -> None:
        """`path` is the configuration file. By default it is the file that the command `serve` uses."""
        self.path = find_serve_file(path)
        self.file: ServeFile | None = None
        self.settings: Settings | None = None
        self.plan: Plan | None = None
        self._num_gpus = 0

    def run(self, *, features: bool = False) -> Iterator[Finding]:
        """Yield the findings as they are made. With `features`, also try each accelerated feature alone."""
        yield from run_check("Python", machine.check_python)
        yield from run_check("torch", machine.check_torch)
        yield from run_check("GPUs", self._count_gpus)
        for index in range(self._num_gpus):
            yield from run_check(f"GPU {index}", partial(machine.check_gpu, index))
        yield from run_check("configuration", self._read)
        if self.file is None or self.plan is None:
            return
        settings = self.plan.settings
        yield from run_check("ports", partial(machine.check_ports, self.file, settings))
        yield from run_check("HAProxy", partial(machine.check_haproxy, settings))
        yield from run_check("job store", partial(machine.check_job_store, settings))
        yield from run_check("files of jobs", partial(machine.check_files, settings))
        models = [ModelChecks(self.plan, model, num_gpus=self._num_gpus) for model in settings.models]
        for checks in models:
            name = checks.name
            yield from run_check(f"{name}: files", checks.files)
            yield from run_check(f"{name}: adapters", checks.adapters)
            yield from run_check(f"{name}: memory", checks.memory)
            yield from run_check(f"{name}: profile", checks.profile)
            yield from run_check(f"{name}: speed", checks.speed)
            if features:
                yield from run_check(f"{name}: features", checks.features)
        yield from run_check("memory", partial(check_shared_memory, models))

    def _count_gpus(self) -> Iterator[Finding]:
        self._num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not self._num_gpus:
            yield Finding("GPUs", "ok", "none that torch can use; models run on the CPU")

    def _read(self) -> Iterator[Finding]:
        """Read the configuration and check it as a starting server does."""
        file = read_serve_file(self.path)
        self.settings = settings = load_settings(file.args)
        if file.path != PACKAGED_FILE:  # importing Ray's schema takes a second
            deploy_schema(file, host="127.0.0.1", port=8000)
        plan = plan_deployments(settings)
        self.file, self.plan = file, plan
        check_key_file(plan.settings.api.key_file)
        check_gpu_shares(settings, cluster_gpus=self._num_gpus)
        nodes = [Slot(self._num_gpus, plan.num_cpus)]
        require_room(settings, nodes, least=plan.least_replicas, cluster_gpus=self._num_gpus)
        served = f"{', '.join(plan.names)}; {plan.catalog.default.name} is the default"
        yield Finding("configuration", "ok", f"{file.path} serves {served}")
        problems: list[str] = []
        check_proxy(settings, os.environ, print_error=problems.append)
        for problem in problems:
            yield Finding("configuration", "warning", problem.removeprefix("warning: "))
