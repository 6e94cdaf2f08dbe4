"""What Ray reserves for each replica, of CPUs and GPUs, and from that: whether replicas that may share a GPU would have
more than its memory, and which models' updates may start a replica more. Pure: no torch, no running Ray.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from stable_audio_serve.core.errors import ConfigError
from stable_audio_serve.core.settings import ModelSettings, Settings
from stable_audio_serve.serving.shares import GpuReplicas, check_shares
from stable_audio_serve.serving.surge import Slot, has_room

_GPU_PRECISION = 10_000  # Ray's own


def replica_slot(settings: Settings, model: ModelSettings, *, cluster_gpus: float) -> Slot:
    """Returns what a replica of a model reserves on a cluster with `cluster_gpus` GPUs. Raises ConfigError."""
    gpus = reserved_gpus(settings, model, cluster_gpus=cluster_gpus)
    return Slot(gpus, reserved_cpus(model, num_gpus=gpus))


def check_gpu_shares(settings: Settings, *, cluster_gpus: float) -> None:
    """Raise ConfigError for models whose replicas, on one GPU together, would have more than all of its memory."""
    gpus = {model.name: reserved_gpus(settings, model, cluster_gpus=cluster_gpus) for model in settings.models}
    check_shares(
        GpuReplicas(
            model.name,
            gpu=gpus[model.name],
            memory=model.memory_share or min(gpus[model.name], 1.0),
            count=model.replicas.max_replicas,
        )
        for model in settings.models
        if gpus[model.name] <= 1
    )


def decide_surge(settings: Settings, nodes: Sequence[Slot], *, cluster_gpus: float) -> Settings:
    """Returns the settings with `replicas.surge` of every model decided: on where `nodes` have room for one more
    replica of it beside all replicas there may ever be. Raises ConfigError.
    """
    slots = {model.name: replica_slot(settings, model, cluster_gpus=cluster_gpus) for model in settings.models}
    taken = [slots[model.name] for model in settings.models for _ in range(model.replicas.max_replicas)]
    taken += [Slot(0.0, settings.ingress.num_cpus)] * settings.ingress.replicas
    models = tuple(
        model
        if model.replicas.surge is not None
        else model.model_copy(
            update={
                "replicas": model.replicas.model_copy(update={"surge": has_room(nodes, taken, extra=slots[model.name])})
            }
        )
        for model in settings.models
    )
    return settings.model_copy(update={"models": models})


def reserved_cpus(model: ModelSettings, *, num_gpus: float) -> float:
    """Returns the operator's choice, else the threads if set: unset ones follow the machine, which is unknown here."""
    if model.num_cpus is not None:
        return model.num_cpus
    return 1.0 if num_gpus else float(model.threads or 1)


def reserved_gpus(settings: Settings, model: ModelSettings, *, cluster_gpus: float) -> float:
    """Returns the operator's choice, else a whole GPU, or an equal share where there are fewer GPUs than models."""
    if model.num_gpus is not None:
        return model.num_gpus
    if not may_use_gpu(settings, model):
        return 0.0
    if not cluster_gpus:
        device = model.device or settings.device
        if device is None:
            return 0.0
        raise ConfigError(
            f"models.{model.name}: device is {device} but this Ray has no GPU; "
            "set num_gpus if one will be added by autoscaling",
            field="device",
        )
    rivals = [other for other in settings.models if other.num_gpus is None and may_use_gpu(settings, other)]
    taken = sum((other.num_gpus or 0) * (other.replicas.min_replicas or 1) for other in settings.models)
    places = sum(other.replicas.min_replicas or 1 for other in rivals)
    share = math.floor((cluster_gpus - taken) / places * _GPU_PRECISION) / _GPU_PRECISION
    return min(1.0, share) if share > 0 else 1.0


def may_use_gpu(settings: Settings, model: ModelSettings) -> bool:
    """Whether a model would run on a GPU where there is one."""
    device = model.device or settings.device
    return device is None or device.startswith("cuda")
