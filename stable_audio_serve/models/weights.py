"""Loads weight files into modules, strictly: whatever does not fit the network is an error naming the key.

Knows files and modules, not families: a key's prefix tells which module it belongs to.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from stable_audio_serve.core.errors import CheckpointError, ConfigError
from stable_audio_serve.models.blocks import RMSNorm
from stable_audio_serve.models.checkpoint_files import damaged

TRAINING_PREFIXES = ("diffusion.", "diffusion_ema.")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def resolve_dtype(device: torch.device, dtype: str | torch.dtype | None) -> torch.dtype:
    """Returns the denoiser's precision: on CUDA `dtype`, float16 by default; elsewhere always float32.

    Autoencoder and conditioners stay in float32, the text encoder in the dtype of its files. Raises ConfigError.
    """
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}", field="dtype")
        dtype = DTYPES[dtype]
    if device.type != "cuda":
        return torch.float32
    return dtype or torch.float16


def require_exact_float32() -> None:
    """Switch off what CUDA libraries do to speed up float32 and half precision by rounding, for the whole process.

    Convolutions would otherwise run in TF32, whose 10 bits the autoencoder and every parity bound would notice.
    """
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def read_weights(path: Path) -> dict[str, Tensor]:
    """Returns all tensors of a file by key, on the CPU. Pickles are read by the unpickler that builds only tensors.

    Raises CheckpointError when the file is missing, corrupt, cut short, or a raw training checkpoint.
    """
    weights = _read_pickle(path) if path.suffix == ".ckpt" else _read_safetensors(path)
    if any(key.startswith(TRAINING_PREFIXES) for key in weights):
        raise CheckpointError(f"{path} is a raw training checkpoint; export it first, then serve the exported file")
    return weights


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise damaged(path, error) from error


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is corrupt or holds more than tensors, which is not loaded for safety; convert it to safetensors"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise damaged(path, error) from error
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} does not hold a state_dict of tensors")
    return state


@contextmanager
def skipping_random_weights() -> Iterator[None]:
    """Modules built inside are left uninitialised where torch would draw random weights; fill them before use."""
    with _SkipDraws():
        yield


class _SkipDraws(TorchFunctionMode):
    DRAWS = (Tensor.uniform_, Tensor.normal_)

    def __torch_function__(  # noqa: PLR0917  # as torch calls it
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return args[0] if func in self.DRAWS else func(*args, **(kwargs or {}))


def assign_weights(modules: Mapping[str, nn.Module], weights: Mapping[str, Tensor], *, source: Path) -> None:
    """Set every parameter and stored buffer of `modules` (by key prefix) to its tensor, float32 and without gradient.

    Raises CheckpointError naming the first key that is unknown, missing or of another shape, and how many there are.
    """
    states = {prefix: module.state_dict() for prefix, module in modules.items()}
    expected = {prefix + key: value.shape for prefix, state in states.items() for key, value in state.items()}
    _refuse(source, "does not belong to this network", keys=sorted(weights.keys() - expected.keys()))
    _refuse(source, "is missing", keys=sorted(expected.keys() - weights.keys()))
    for key, shape in expected.items():
        tensor = weights[key]
        if tensor.shape != shape:
            raise CheckpointError(f"{source}: {key} has shape {list(tensor.shape)}, the network needs {list(shape)}")
        if not tensor.is_floating_point():
            raise CheckpointError(f"{source}: {key} holds {tensor.dtype}, not floating-point numbers")
    for prefix, module in modules.items():
        state = {key: weights[prefix + key].float() for key in states[prefix]}
        module.load_state_dict(state, strict=True, assign=True)
        module.eval().requires_grad_(False)


def _refuse(source: Path, what: str, *, keys: list[str]) -> None:
    if keys:
        others = f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""
        raise CheckpointError(f"{source}: {keys[0]}{others} {what}")


def cast_network(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast a network's weights to `dtype`, in place.

    Buffers (rotary frequencies) and the gains of RMS norms stay in float32: both are used in float32 arithmetic.
    """
    for part in module.modules():
        if isinstance(part, RMSNorm):
            continue
        for parameter in part.parameters(recurse=False):
            parameter.data = parameter.data.to(dtype)
