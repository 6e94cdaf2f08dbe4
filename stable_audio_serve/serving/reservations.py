"""Compute the CPUs and GPUs that each replica reserves. Imports no torch and needs no running Ray.

Also checks that the replicas on one GPU fit into its memory, and decides which models may start an extra replica during
updates.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from stable_audio_serve.core.errors import ConfigError
from stable_audio_serve.core.settings import ModelSettings, Settings

_GPU_PRECISION = 10_000  # Ray counts GPUs in multiples of 1/10,000
_TOLERANCE = 1e-6  # a sum of fractions may exceed its limit by this, because of rounding


@dataclass(frozen=True, slots=True)
class Slot:
    """The numbers of GPUs and CPUs that a replica reserves or that a node has."""

    gpus: float
    cpus: float


def replica_slot(settings: Settings, model: ModelSettings, *, cluster_gpus: float) -> Slot:
    """Return what a model's replica reserves on a cluster with `cluster_gpus` GPUs. Raises ConfigError."""
    gpus = reserved_gpus(settings, model, cluster_gpus=cluster_gpus)
    return Slot(gpus, reserved_cpus(model, num_gpus=gpus))


def check_gpu_shares(settings: Settings, *, cluster_gpus: float) -> None:
    """Raise ConfigError if a replica may use a larger share of a GPU's memory than it reserves of the GPU.

    Ray places replicas on a GPU as long as the sum of their GPU shares is at most 1, and does not count memory.
    """
    for model in settings.models:
        gpus = reserved_gpus(settings, model, cluster_gpus=cluster_gpus)
        if model.memory_share is not None and 0 < gpus < model.memory_share - _TOLERANCE:
            raise ConfigError(
                f"models.{model.name}: memory_share {model.memory_share:g} is larger than num_gpus {gpus:g}, so other "
                "replicas on the same GPU could lack memory; lower memory_share, or raise num_gpus",
                field="memory_share",
            )


def require_room(settings: Settings, nodes: Sequence[Slot], *, least: Mapping[str, int], cluster_gpus: float) -> None:
    """Raise ConfigError if a model could never start, because Ray waits forever for resources that no node has.

    `least` has each model's smallest number of replicas. All these replicas must fit on the nodes together, and so must
    one replica of each other model beside them. `nodes` has the resources of each node.
    """
    slots = {model.name: replica_slot(settings, model, cluster_gpus=cluster_gpus) for model in settings.models}
    kept = [Slot(0.0, settings.ingress.num_cpus)] * settings.ingress.replicas
    for name in sorted(slots, key=lambda name: not least[name]):
        if not has_room(nodes, kept + [slots[name]] * (least[name] - 1), extra=slots[name]):
            taken = sum(slot.gpus for slot in kept)
            raise ConfigError(
                f"models.{name}: {max(least[name], 1)} replica(s) with num_gpus {slots[name].gpus:g} do not fit on "
                f"{cluster_gpus:g} GPU(s), of which other models reserve {taken:g}; lower num_gpus or min_replicas, or "
                "leave num_gpus unset for equal shares",
                field="num_gpus",
            )
        kept += [slots[name]] * least[name]


def decide_surge(settings: Settings, nodes: Sequence[Slot], *, cluster_gpus: float) -> Settings:
    """Return the settings with `replicas.surge` set for every model: whether updates start an extra replica.

    An unset `surge` becomes true if one more replica of the model fits on the nodes when every model has its largest
    number of replicas. `nodes` has the resources of each node. Raises ConfigError.
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
    """Return the number of CPUs that a replica reserves: the setting `num_cpus` if it is set.

    Otherwise the number is 1 for a replica with a GPU, and the setting `threads` (1 if unset) for a replica without a
    GPU. The number of threads that a replica uses by default depends on its machine, which is unknown here.
    """
    if model.num_cpus is not None:
        return model.num_cpus
    return 1.0 if num_gpus else float(model.threads or 1)


def reserved_gpus(settings: Settings, model: ModelSettings, *, cluster_gpus: float) -> float:
    """Return the number of GPUs that a replica reserves: the setting `num_gpus` if it is set.

    Otherwise the number is 0 for a model that does not run on a GPU. For other models, it is one GPU, or an equal share
    of a GPU if there are not enough GPUs for all models. Raises ConfigError if the model's device is a GPU but the
    cluster has none, or a GPU with a number, because a replica sees only the GPUs that it reserves.
    """
    device = model.device or settings.device
    if device is not None and device.startswith("cuda:") and device != "cuda:0":
        raise ConfigError(
            f"models.{model.name}: device {device} cannot be chosen, because Ray assigns the GPUs; set it to cuda, and "
            "CUDA_VISIBLE_DEVICES to the GPUs that the server may use",
            field="device",
        )
    if model.num_gpus is not None:
        return model.num_gpus
    if not may_use_gpu(settings, model):
        return 0.0
    if not cluster_gpus:
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
    return _equal_share(cluster_gpus - taken, places=places)


def _equal_share(gpus: float, *, places: int) -> float:
    """Return the largest share (0..1) of a GPU that `places` replicas can each have. No replica spans two GPUs.

    `gpus` is the number of free GPUs, whose fraction is the rest of a GPU that other replicas use in part. Returns 1 if
    none is free.
    """
    whole, rest = divmod(max(math.floor(gpus * _GPU_PRECISION + _TOLERANCE), 0), _GPU_PRECISION)
    shares = [Fraction(room, count) for room in (_GPU_PRECISION, rest) for count in range(1, places + 1) if room]
    fitting = [share for share in shares if whole * (_GPU_PRECISION // share) + rest // share >= places]
    return math.floor(max(fitting, default=_GPU_PRECISION)) / _GPU_PRECISION


def may_use_gpu(settings: Settings, model: ModelSettings) -> bool:
    """Return True if the model would run on a GPU if there is one. With `num_gpus` 0, only if `device` is cuda."""
    device = model.device or settings.device
    return model.num_gpus != 0 if device is None else device.startswith("cuda")


def has_room(nodes: Sequence[Slot], taken: Iterable[Slot], *, extra: Slot) -> bool:
    """Return True if `extra` fits on one of `nodes` after the slots in `taken` were placed on them, largest first."""
    free = [_FreeNode.of(node) for node in nodes]
    largest_first = sorted(taken, key=lambda slot: (slot.gpus, slot.cpus), reverse=True)
    return all(_place(free, slot) for slot in (*largest_first, extra))


@dataclass(slots=True)
class _FreeNode:
    """The free resources of a node. `gpus` has the free share (0..1) of each GPU."""

    gpus: list[float]
    cpus: float

    @classmethod
    def of(cls, node: Slot) -> _FreeNode:
        rest = node.gpus - int(node.gpus)
        return cls([1.0] * int(node.gpus) + [rest] * bool(rest), node.cpus)

    def places(self, slot: Slot) -> list[int] | None:
        """Return the indices of the GPUs that a slot would get: the fullest one with room, or several whole GPUs.

        Returns None if the slot does not fit.
        """
        count = math.ceil(slot.gpus)
        each = min(slot.gpus, 1.0)
        fitting = sorted((free, index) for index, free in enumerate(self.gpus) if free + _TOLERANCE >= each)
        if len(fitting) < count or self.cpus + _TOLERANCE < slot.cpus:
            return None
        return [index for _, index in fitting[:count]]


def _place(free: list[_FreeNode], slot: Slot) -> bool:
    """Subtract a slot from the resources of the fullest node that has room for it. Returns False if no node has room.

    Ray Serve also prefers the fullest node if RAY_SERVE_USE_PACK_SCHEDULING_STRATEGY is 1.
    """
    fitting = [node for node in free if node.places(slot) is not None]
    if not fitting:
        return False
    node = min(fitting, key=lambda node: (sum(node.gpus), node.cpus))
    for index in node.places(slot) or ():
        node.gpus[index] -= min(slot.gpus, 1.0)
    node.cpus -= slot.cpus
    return True


def node_slots(nodes: Iterable[Mapping[str, Any]]) -> list[Slot]:
    """Return the GPUs and CPUs of each node that is alive. `nodes` is the result of `ray.nodes()`."""
    alive = (node["Resources"] for node in nodes if node["Alive"])
    return [Slot(resources.get("GPU", 0.0), resources.get("CPU", 0.0)) for resources in alive]
