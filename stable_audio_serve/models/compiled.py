"""Compiles a denoiser's layers by `torch.compile`: only the block that repeats, so that one compilation serves all of
them. Owns where compiled kernels are kept. Knows no engine.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch

from stable_audio_serve.core.errors import ConfigError
from stable_audio_serve.core.private_files import make_private_folder, require_own_folder
from stable_audio_serve.models.forwarding import ForwardingModel
from stable_audio_serve.models.protocol import DiffusionModel, ModelSpec
from stable_audio_serve.models.sa3.model import Sa3Model
from stable_audio_serve.models.sao.model import SaoModel

KERNELS = Path("~/.cache/stable-audio-serve/compiled")  # compiled ones, found again by later processes
_MOST_VARIANTS = 64  # of a layer: one row or several, with a text or without, ...; torch's own bound of 8 is too low


class CompiledModel(ForwardingModel):
    """A model whose layers are compiled when they are first called."""

    @property
    def spec(self) -> ModelSpec:
        """On a CPU rows do not go packed, where each mixture of lengths would be compiled anew, and nowhere by
        segments, which no compiled layer was tried with."""
        spec = self._model.spec
        return replace(
            spec, is_compiled=True, packs_rows=spec.packs_rows and self.device.type != "cpu", packs_segments=False
        )


def compile_layers(model: DiffusionModel, *, folder: Path = KERNELS, backend: str = "inductor") -> CompiledModel:
    """Returns the model with layers that will be compiled; numbers of rows and of frames share one compilation.

    Compiled kernels are kept in `folder` and found again by later processes. Raises ConfigError, naming `compile`,
    where nothing can be compiled, and for a folder that others could write to: it holds programs.
    """
    if not isinstance(model, Sa3Model | SaoModel):
        raise ConfigError("compile needs the networks of `backend: native`", field="compile")
    _keep_kernels(folder)
    _require_compiler(model.device, backend)
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, _MOST_VARIANTS)
    for layer in model.denoiser.transformer.typed_layers:
        layer.compile(fullgraph=True, dynamic=True, backend=backend)
    return CompiledModel(model)


def _keep_kernels(folder: Path) -> None:
    """Tell torch where compiled kernels are: its own place is one in /tmp that another user may have made before."""
    folder = folder.expanduser().absolute()
    try:
        make_private_folder(folder)
        require_own_folder(folder)
    except OSError as error:
        raise ConfigError(f"compile: the folder {folder} cannot be used: {error}", field="compile") from error
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    os.environ["TRITON_CACHE_DIR"] = str(folder / "triton")


def _require_compiler(device: torch.device, backend: str) -> None:
    """Compile something small: the one way to know that compiler, headers and, on CUDA, Triton are all there."""
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
