"""How a device's memory is divided among the processes on it, and one process's part among what its engine does there.

Arithmetic on bytes; knows no device and no allocator.
"""

from __future__ import annotations

from dataclasses import dataclass

from stable_audio_serve.core.errors import ConfigError

WHOLE = 1.0  # the share of a process that has a device for itself
# What a process on CUDA takes beside its tensors where others are on the device too: CUDA's context, and the code and
# workspaces of its libraries.
CONTEXT_BYTES = 512 * 2**20
_ROWS = 0.85  # of what weights and prompts leave: the rest is for captured calls and for what the allocator splits


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """A device's memory in bytes: `total`, `allowed` to this process's tensors, `held` for them, `free` for anybody."""

    total: int
    allowed: int
    held: int
    free: int

    @property
    def left(self) -> int:
        """What this process can still take."""
        return max(0, min(self.free, self.allowed - self.held))


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bounds in bytes, None without one: of all variations in progress, and of what captured calls keep.

    `setting` is the one to change where the first bound is too low.
    """

    rows: int | None = None
    captures: int | None = None
    setting: str = "max_memory_bytes"


def allowed_bytes(total: int, *, share: float) -> int:
    """Returns what the tensors of a process with this share, 0..1, of a device may take."""
    return max(0, int(share * total) - (CONTEXT_BYTES if share < WHOLE else 0))


def plan_memory(memory: DeviceMemory | None, *, max_rows_bytes: int | None, prompt_cache_bytes: int) -> MemoryPlan:
    """Returns the bounds of an engine whose weights are loaded; `memory` None: the device has none of its own.

    `max_rows_bytes` is what the operator gives to variations in progress; None: most of what is left. Raises
    ConfigError where that can never be there.
    """
    if memory is None:
        return MemoryPlan(rows=max_rows_bytes)
    own = memory.allowed - memory.held - prompt_cache_bytes
    if max_rows_bytes is not None and max_rows_bytes > own:
        raise ConfigError(
            f"max_memory_bytes is {max_rows_bytes / 1e9:.3g} GB, but of the device's {memory.total / 1e9:.3g} GB this "
            f"replica may take {memory.allowed / 1e9:.3g} GB, its weights {memory.held / 1e9:.3g} GB and encoded "
            f"prompts {prompt_cache_bytes / 1e9:.3g} GB of it; allowed: up to "
            f"{max(own, 0)} bytes",
            field="max_memory_bytes",
            allowed=f"1..{max(own, 0)}",
        )
    left = max(memory.left - prompt_cache_bytes, 0)
    if max_rows_bytes is not None:
        return MemoryPlan(max_rows_bytes, max(left - max_rows_bytes, 0))
    rows = int(_ROWS * left)
    return MemoryPlan(max(rows, 1), left - rows, "memory_share")


def require_share(memory: DeviceMemory, *, name: str, weights_bytes: int, share: float) -> None:
    """Raises ConfigError with the least share unless the weights of a model, about to be loaded, fit into this one."""
    if weights_bytes <= memory.allowed:
        return
    taken = f"its weights take {weights_bytes / 1e9:.3g} GB"
    if share < WHOLE:
        taken += f" and CUDA itself up to {CONTEXT_BYTES / 1e9:.2g} GB"
    least = least_share(memory.total, weights_bytes=weights_bytes)
    needed = f"a memory_share of at least {least:.2f}" if least <= WHOLE else "a larger GPU"
    raise ConfigError(
        f"models.{name}: memory_share {share:g} of the GPU's {memory.total / 1e9:.3g} GB is too small for the model: "
        f"{taken}; it needs {needed}, and room for requests besides",
        field="memory_share",
        allowed=f"{least:.2f}..1",
    )


def least_share(total: int, *, weights_bytes: int) -> float:
    """Returns the smallest share that holds the weights, in hundredths; above 1 if none does."""
    if weights_bytes <= total < weights_bytes + CONTEXT_BYTES:
        return WHOLE  # alone on the device a process need not leave anything for others' contexts
    return -(-100 * (weights_bytes + CONTEXT_BYTES) // total) / 100
