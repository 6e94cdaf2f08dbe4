"""Compiles a denoiser's layers with `torch.compile`, and sets the folder of compiled kernels.

The layers are compiled one by one, not the network as a whole. They have the same code, so that all layers share one
compilation. Independent of the engine.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from stable_audio_serve.core.errors import ConfigError
from stable_audio_serve.core.private_files import make_private_folder, require_own_folder
from stable_audio_serve.models.native import NativeModel
from stable_audio_serve.models.protocol import DiffusionModel

KERNELS = Path("~/.cache/stable-audio-serve/compiled")  # folder of compiled kernels, for reuse by later processes
# Largest number of compilations per layer. Torch's default of 8 is too small: every kind of call needs its own
# compilation, for example calls with one row and with several rows, each with text and without text.
_MOST_VARIANTS = 64


def compile_layers(model: DiffusionModel, *, folder: Path = KERNELS, backend: str = "inductor") -> DiffusionModel:
    """Returns the model, which from now on compiles its layers on their first call, for any number of rows and frames.

    Compiled kernels are cached in `folder` for later processes. Raises ConfigError with the field `compile` if the
    machine cannot compile. Also raises it if other users can write to `folder`, because this process executes the files
    in it.
    """
    native: object = model
    if not isinstance(native, NativeModel):
        raise ConfigError("compile needs the networks of `backend: native`", field="compile")
    _keep_kernels(folder)
    _require_compiler(model.device, backend)
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, _MOST_VARIANTS)
    native.compile_layers(backend)
    return model


def _keep_kernels(folder: Path) -> None:
    """Make torch cache kernels in `folder`. Torch's default is a folder in /tmp, which other users can create first."""
    folder = folder.expanduser().absolute()
    try:
        make_private_folder(folder)
        require_own_folder(folder)
    except OSError as error:
        raise ConfigError(f"compile: the folder {folder} cannot be used: {error}", field="compile") from error
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    os.environ["TRITON_CACHE_DIR"] = str(folder / "triton")


def _require_compiler(device: torch.device, backend: str) -> None:
    """Raise ConfigError unless a small function can be compiled.

    This is the only reliable check for a compiler, its headers and, on CUDA, Triton.
    """
    probe = torch.compile(_probe, fullgraph=True, dynamic=False, backend=backend)
    try:
        with torch.inference_mode():
            probe(torch.zeros(64, device=device))
    except Exception as error:
        reason = " ".join(line for line in str(error).splitlines()[:2] if line) or repr(error)
        message = f"compile cannot be used on {device}: {reason} (it needs a C++ compiler, on CUDA Triton, too)"
        raise ConfigError(message, field="compile") from error


def _probe(x: torch.Tensor) -> torch.Tensor:
    return torch.sin(x) + 1.0
