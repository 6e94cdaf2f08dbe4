"""Whether Ray has room for one more replica of a model than it ever runs: then an update starts the new one first.

Pure arithmetic over reservations; knows nothing of memory, which Ray does not reserve.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_SLACK = 1e-6  # of sums of fractions


@dataclass(frozen=True, slots=True)
class Slot:
    """What one replica reserves of a node."""

    gpus: float
    cpus: float


def has_room(nodes: Sequence[Slot], taken: Iterable[Slot], *, extra: Slot) -> bool:
    """Whether `extra` fits on one of `nodes` after all of `taken` were placed, the largest first."""
    free = [[node.gpus, node.cpus] for node in nodes]
    largest_first = sorted(taken, key=lambda slot: (slot.gpus, slot.cpus), reverse=True)
    return all(_place(free, slot) for slot in (*largest_first, extra))


def _place(free: list[list[float]], slot: Slot) -> bool:
    """Take a slot from the node where the least is left, which Ray's packing does too."""
    fitting = [node for node in free if node[0] + _SLACK >= slot.gpus and node[1] + _SLACK >= slot.cpus]
    if not fitting:
        return False
    node = min(fitting)
    node[0] -= slot.gpus
    node[1] -= slot.cpus
    return True


def node_slots(nodes: Iterable[Mapping[str, Any]]) -> list[Slot]:
    """Returns what the living ones of `ray.nodes()` have."""
    alive = (node["Resources"] for node in nodes if node["Alive"])
    return [Slot(resources.get("GPU", 0.0), resources.get("CPU", 0.0)) for resources in alive]
