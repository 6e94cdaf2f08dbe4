"""Divides a device's memory among processes, and the part of one process among clips in progress, CUDA graphs and
cached prompts. Only arithmetic; allocates nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from stable_audio_serve.core.errors import ConfigError

WHOLE = 1.0  # the share of a process that has the device to itself
# Memory that a process on a shared GPU uses in addition to its tensors: the CUDA context, library code and workspaces.
CONTEXT_BYTES = 512 * 2**20
# Of the memory that weights and cached prompts leave, clips in progress get this share. CUDA graphs get the rest, which
# must also allow for fragmentation.
_ROWS = 0.85


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """A device's memory in bytes. This process's tensors use `held` and may use `allowed`. `free` is what no process
    uses.
    """

    total: int
    allowed: int
    held: int
    free: int

    @property
    def left(self) -> int:
        """Bytes that this process can still allocate."""
        return max(0, min(self.free, self.allowed - self.held))


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Limits in bytes for clips in progress (`rows`) and for CUDA graphs (`captures`); None means no limit.

    `setting` names the setting to change if `rows` is too low.
    """

    rows: int | None = None
    captures: int | None = None
    setting: str = "max_memory_bytes"


def allowed_bytes(total: int, *, share: float) -> int:
    """Return how many of the device's `total` bytes the tensors of a process with this share (0..1) may use."""
    return max(0, int(share * total) - (CONTEXT_BYTES if share < WHOLE else 0))


def plan_memory(memory: DeviceMemory | None, *, max_rows_bytes: int | None, prompt_cache_bytes: int) -> MemoryPlan:
    """Return the limits of an engine whose weights are loaded. `memory` is None if the device shares the host's memory.

    `max_rows_bytes` is the operator's limit for clips in progress. If it is None, the clips may use most of the
    remaining memory. Raises ConfigError if `max_rows_bytes` is more than this process may allocate.
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
    """Raise ConfigError, with the smallest share that works, if a model's weights do not fit into this share."""
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
    """Return the smallest share that holds the weights, rounded up to hundredths; above 1 if none does."""
    if weights_bytes <= total < weights_bytes + CONTEXT_BYTES:
        return WHOLE  # a process that has the device to itself reserves nothing for the CUDA context
    return -(-100 * (weights_bytes + CONTEXT_BYTES) // total) / 100
