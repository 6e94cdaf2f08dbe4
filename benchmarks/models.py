"""Loads the models that the benchmark cases measure, and compares two lists of generated clips."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.compare import compare
from benchmarks.settings import CaseSettings
from stable_audio_serve.core.generation import GenerationResult, Lora, Mode
from stable_audio_serve.models.adapters.base import adaptable_layers
from stable_audio_serve.models.families import load_model
from stable_audio_serve.models.protocol import AdaptableModel, DiffusionModel
from stable_audio_serve.models.registry import ModelEntry, resolve_entry

_RANK = 16  # of random adapters
# For each engine mode: the largest allowed difference between two clips of a request, divided by the clip's level.
_LARGEST_DIFFERENCE = {"strict": 0.0, "fast": 1e-2}


def load(settings: CaseSettings) -> DiffusionModel:
    """Returns the model to measure, on its device."""
    return load_model(resolve_model(settings.model), device=settings.device)


def resolve_model(name: str | None) -> ModelEntry:
    """Returns the registry entry of a model name or a checkpoint folder. None means the demo model."""
    name = name or "demo"
    return resolve_entry(Path(name).name, path=name) if Path(name).is_dir() else resolve_entry(name)


def write_adapters(model: DiffusionModel, folder: Path, *, count: int) -> list[Lora]:
    """Write random adapters of rank 16, and return them. They change all layers that run in every denoising step."""
    loras: list[Lora] = []
    for number in range(count):
        assert isinstance(model, AdaptableModel)
        random, tensors = torch.Generator().manual_seed(number), {}
        for name, layer in adaptable_layers(model.adaptable).items():
            key, (out, width) = f"{name}.parametrizations.weight.0", layer.weight.flatten(1).shape
            if model.runs_in_steps(name):
                tensors[f"{key}.lora_A"] = 0.1 * torch.randn(_RANK, width, generator=random) / width**0.5
                tensors[f"{key}.lora_B"] = torch.randn(out, _RANK, generator=random) / _RANK**0.5
        path = folder / f"random-{number}.safetensors"
        save_file(tensors, path)
        loras.append(Lora(path.stem, source=str(path), sha256=hashlib.sha256(path.read_bytes()).hexdigest()))
    return loras


def compare_audio(
    left: Sequence[GenerationResult], right: Sequence[GenerationResult], *, mode: Mode
) -> dict[str, float]:
    """Compares the first clip of each result in `left` with the first clip of the result at the same index in `right`.

    Returns the differences. Raises VoidError if one is larger than the engine's `mode` allows.
    """
    clips = [[result.audio[0] for result in results] for results in (left, right)]
    return compare(clips[0], {"engine": clips[1]}, bound=_LARGEST_DIFFERENCE[mode])["engine"]
