"""Divides a device's memory among processes, and the memory of one process among weights, cached prompts, clips in
progress, CUDA graphs and a reserve. Only calculates sizes; allocates nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from stable_audio_serve.core.errors import ConfigError

WHOLE = 1.0  # the share of a process that has the device to itself
# Memory that a process on a shared GPU uses in addition to its tensors: the CUDA context, library code and workspaces.
CONTEXT_BYTES = 512 * 2**20
# This fraction of the memory that a process may use is left unused. It is for fragmentation, and for memory that
# libraries (and the driver, on a GPU with several replicas) allocate later.
_RESERVE = 0.05
_GRAPHS = 0.15  # CUDA graphs get this fraction of the memory that is left after weights, caches and the reserve


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """A device's memory in bytes. The tensors of this process use `held` bytes and may use `allowed` bytes. No process
    uses the `free` bytes.
    """

    total: int
    allowed: int
    held: int
    free: int

    @property
    def used(self) -> int:
        """The bytes in use. If this process may use the whole device, these are all bytes that are not free, so the
        driver and libraries count too. Otherwise, only the tensors of this process count.
        """
        return self.total - self.free if self.allowed == self.total else self.held

    @property
    def left(self) -> int:
        """Bytes that this process can still allocate."""
        return max(0, min(self.free, self.allowed - self.held))


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """How the memory of an engine is divided, in bytes. `rows` and `graphs` are None if they are not limited.

    `rows` is for all clips in progress. It includes `context`, their stored conditioning, and `decode`, the temporary
    tensors of decoding while other clips are denoised; both are 0 until the engine has measured the model. `setting`
    names the setting that limits `rows`.
    """

    weights: int = 0
    prompts: int = 0
    adapters: int = 0
    rows: int | None = None
    context: int = 0
    decode: int = 0
    graphs: int | None = None
    reserve: int = 0
    setting: str = "max_memory_bytes"

    def parts(self) -> dict[str, int]:
        """Return the bytes of each part of the memory. The result is empty if memory is not limited."""
        if self.rows is None:
            return {}
        return {
            "weights": self.weights,
            "prompts": self.prompts,
            "adapters": self.adapters,
            "context": self.context,
            "rows": self.rows - self.context - self.decode,
            "decode": self.decode,
            "graphs": self.graphs or 0,
            "reserve": self.reserve,
        }

    def __str__(self) -> str:
        """The parts in GB, for logs; empty if memory is not limited."""
        return " ".join(f"{name}_gb={num_bytes / 1e9:.2f}" for name, num_bytes in self.parts().items())


def allowed_bytes(total: int, *, share: float) -> int:
    """Return how many of the device's `total` bytes the tensors of a process with this share (0..1) may use."""
    return max(0, int(share * total) - (CONTEXT_BYTES if share < WHOLE else 0))


def plan_memory(
    memory: DeviceMemory | None,
    *,
    max_rows_bytes: int | None,
    prompt_cache_bytes: int,
    lora_cache_bytes: int = 0,
    captures: bool = True,
) -> MemoryPlan:
    """Return the plan of an engine whose weights are loaded. `memory` is None if the device shares the host's memory.

    `max_rows_bytes` is the operator's limit for clips in progress. If it is None, the clips may use most of the
    remaining memory. With `captures`, some memory is set aside for CUDA graphs. Raises ConfigError if `max_rows_bytes`
    is more than this process may allocate.
    """
    if memory is None:
        return MemoryPlan(rows=max_rows_bytes)
    caches = prompt_cache_bytes + lora_cache_bytes
    own = memory.allowed - memory.held - caches
    if max_rows_bytes is not None and max_rows_bytes > own:
        raise ConfigError(
            f"max_memory_bytes is {max_rows_bytes / 1e9:.3g} GB, but of the device's {memory.total / 1e9:.3g} GB this "
            f"replica may take {memory.allowed / 1e9:.3g} GB, its weights {memory.held / 1e9:.3g} GB and encoded "
            f"prompts and adapters {caches / 1e9:.3g} GB of it; allowed: up to "
            f"{max(own, 0)} bytes",
            field="max_memory_bytes",
            allowed=f"1..{max(own, 0)}",
        )
    left = max(memory.left - caches, 0)
    reserve = min(int(_RESERVE * memory.allowed), left)
    graphs = int(_GRAPHS * (left - reserve)) if captures else 0
    rows, setting = max(left - reserve - graphs, 1), "memory_share"
    if max_rows_bytes is not None:
        rows, setting = max_rows_bytes, "max_memory_bytes"
        graphs = min(graphs, max(left - rows, 0))
    return MemoryPlan(
        memory.held,
        prompt_cache_bytes,
        lora_cache_bytes,
        rows=rows,
        graphs=graphs,
        reserve=reserve,
        setting=setting,
    )


def require_share(memory: DeviceMemory, *, name: str, weights_bytes: int, share: float) -> None:
    """Raise ConfigError if a model's weights do not fit into `memory`, of which this process may hold a part already.

    The error has the smallest sufficient share, or says that other programs use the memory.
    """
    usable = memory.free + memory.held
    if weights_bytes <= min(memory.allowed, usable):
        return
    if weights_bytes <= memory.allowed:
        raise ConfigError(
            f"models.{name}: the model's weights take {weights_bytes / 1e9:.3g} GB, but only {usable / 1e9:.3g} GB of "
            f"the GPU's {memory.total / 1e9:.3g} GB are free; stop other programs that use the GPU (nvidia-smi lists "
            "them)",
            field="device",
        )
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
    """Return the smallest `share` of a device with `total` bytes in which the weights fit, rounded up to hundredths.

    The result is above 1 if the device is too small.
    """
    if weights_bytes <= total < weights_bytes + CONTEXT_BYTES:
        return WHOLE  # a process that has the device to itself reserves nothing for the CUDA context
    return -(-100 * (weights_bytes + CONTEXT_BYTES) // total) / 100
