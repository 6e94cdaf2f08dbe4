"""Fills modules with the tensors of a weight file. The prefix of a tensor's key selects the module.

If a key does not fit the networks, an error names the key.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from stable_audio_serve.core.errors import CheckpointError, ConfigError
from stable_audio_serve.core.processor import CPU_FACTS, has_native_bfloat16
from stable_audio_serve.models.weight_files import is_mapped, read_weights, release_pages, require_floats

# Number of threads that cast weights on a CPU, besides torch's threads. Two threads take half of the time of one.
_CPU_THREADS = 2
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def resolve_dtype(device: torch.device, dtype: str | torch.dtype | None, *, cpu_facts: Path = CPU_FACTS) -> torch.dtype:
    """Returns `dtype` as the denoiser's dtype, or the default if it is None: float16 on CUDA and float32 elsewhere.

    Raises ConfigError if the device does not support the dtype, or if the dtype is not faster there than float32. A CPU
    supports float32. It also supports bfloat16 if it has native instructions, but never float16.
    """
    if dtype is None:
        return torch.float16 if device.type == "cuda" else torch.float32
    name = dtype if isinstance(dtype, str) else str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {name!r}", field="dtype")
    if device.type == "cuda" or name == "float32":
        return DTYPES[name]
    if device.type != "cpu" or name != "bfloat16":
        others = " or bfloat16" if device.type == "cpu" else ""
        raise ConfigError(f"dtype {name} cannot be used on {device.type}: only float32{others} can", field="dtype")
    if not has_native_bfloat16(cpu_facts):
        message = "dtype bfloat16 cannot be used on this processor: it has neither AVX512-bf16 nor AMX; use float32"
        raise ConfigError(message, field="dtype")
    return DTYPES[name]


def require_exact_float32() -> None:
    """Turn off, for the whole process, TF32 and half-precision sums in CUDA's convolutions and matrix products.

    TF32 has 10 bits of precision, too few for the bounds of this project's parity checks. Also turns off cuDNN's
    attention, in every precision. Torch prefers it on Hopper and newer GPUs, where cuDNN needs 0.1 to 0.4 s on the host
    for each new shape and results can be wrong (pytorch issue 193893). Of convolutions, only algorithms remain that
    always give the same bits: on some GPUs, cuDNN would choose others for transposed convolutions.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


class SkipRandomWeights(TorchFunctionMode):
    """A context in which new modules get uninitialised weights instead of random ones, which saves time."""

    # Also `nn.init.normal_`, because drawing on the meta device would import torch's compiler, which takes a second.
    DRAWS = (Tensor.uniform_, Tensor.normal_, nn.init.normal_)

    def __torch_function__(  # noqa: PLR0917  # torch's signature
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func not in self.DRAWS:
            return func(*args, **(kwargs or {}))
        return args[0] if args else kwargs["tensor"]


def load_weights(
    modules: Mapping[str, nn.Module],
    path: Path,
    *,
    device: torch.device,
    dtypes: Mapping[str, torch.dtype] = MappingProxyType({}),
) -> list[Tensor]:
    """Fill `modules` from a weight file, one tensor at a time. Returns the tensors that stay memory-mapped.

    `modules` maps the prefix of a module's keys in the file to the module, which may be on the meta device. Every
    parameter and stored buffer is copied to `device` as float32. If a parameter's key begins with a key of `dtypes`,
    the parameter gets the dtype under that key instead. On a CPU, a tensor that needs no cast stays memory-mapped;
    `release_pages` can free it. Raises CheckpointError with the first key that is unknown, missing or of another shape,
    and the number of such keys, or with a key whose values are not finite.
    """
    return load_tensors(modules, read_weights(path), source=path, device=device, dtypes=dtypes)


def load_tensors(
    modules: Mapping[str, nn.Module],
    weights: Mapping[str, Tensor],
    *,
    source: Path,
    device: torch.device,
    dtypes: Mapping[str, torch.dtype],
) -> list[Tensor]:
    """Do the same as `load_weights`, with the `weights` that were read from the file or folder `source`."""
    _check(modules, weights, source=source)
    return _fill(modules, weights, source=source, device=device, casts=_casts(modules, dtypes))


def _casts(modules: Mapping[str, nn.Module], dtypes: Mapping[str, torch.dtype]) -> dict[str, torch.dtype]:
    """Returns the dtype, by key, of each tensor that is not loaded as float32."""
    parameters = [prefix + key for prefix, module in modules.items() for key, _ in module.named_parameters()]
    return {key: dtype for prefix, dtype in dtypes.items() for key in parameters if key.startswith(prefix)}


def _check(modules: Mapping[str, nn.Module], weights: Mapping[str, Tensor], *, source: Path) -> None:
    expected = {
        prefix + key: value.shape for prefix, module in modules.items() for key, value in module.state_dict().items()
    }
    _refuse(source, "does not belong to this network", keys=sorted(weights.keys() - expected.keys()))
    _refuse(source, "is missing", keys=sorted(expected.keys() - weights.keys()))
    for key, shape in expected.items():
        tensor = weights[key]
        if tensor.shape != shape:
            raise CheckpointError(f"{source}: {key} has shape {list(tensor.shape)}, the network needs {list(shape)}")
        require_floats(source, key, weight=tensor)


def _refuse(source: Path, what: str, *, keys: list[str]) -> None:
    if keys:
        others = f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""
        raise CheckpointError(f"{source}: {keys[0]}{others} {what}")


def _fill(
    modules: Mapping[str, nn.Module],
    weights: Mapping[str, Tensor],
    *,
    source: Path,
    device: torch.device,
    casts: Mapping[str, torch.dtype],
) -> list[Tensor]:
    state: dict[str, Tensor] = {}
    mapped, can_release = [], is_mapped(source)

    def load(key: str) -> None:
        tensor, dtype = weights[key], casts.get(key, torch.float32)
        state[key] = loaded = tensor.to(device=device).to(dtype)
        if loaded.numel() and not all(bound.isfinite() for bound in loaded.aminmax()):
            raise CheckpointError(f"{source}: {key} holds values that are not finite in {dtype}")
        if loaded is tensor and can_release:
            mapped.append(tensor)
        elif can_release:
            release_pages([tensor])

    with ThreadPoolExecutor(_CPU_THREADS if device.type == "cpu" else 1) as pool:
        in_file_order = sorted(weights, key=lambda key: weights[key].data_ptr())
        list(pool.map(load, in_file_order))  # a list, so that an exception is raised here
    for prefix, module in modules.items():
        module.load_state_dict({key: state[prefix + key] for key in module.state_dict()}, strict=True, assign=True)
        module.eval().requires_grad_(False)
        module.to(device)  # buffers that no checkpoint contains
    return mapped


def cast_network(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast a network's parameters to `dtype`, in place. Buffers stay in float32: rotary frequencies need it."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
