"""Loads the models that cases measure, and compares two lists of results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.compare import compare
from benchmarks.settings import CaseSettings
from stable_audio_serve.core.generation import GenerationResult, Mode
from stable_audio_serve.models.families import load_model
from stable_audio_serve.models.protocol import DiffusionModel
from stable_audio_serve.models.registry import ModelEntry, resolve_entry

# For each engine mode: the largest allowed difference between two clips of a request, divided by the clip's level.
_LARGEST_DIFFERENCE = {"strict": 0.0, "fast": 1e-2}


def load(settings: CaseSettings) -> DiffusionModel:
    """Returns the model to measure, on its device."""
    return load_model(resolve_model(settings.model), device=settings.device)


def resolve_model(name: str | None) -> ModelEntry:
    """Returns the registry entry of a model name or checkpoint folder; None: the demo model."""
    name = name or "demo"
    return resolve_entry(Path(name).name, path=name) if Path(name).is_dir() else resolve_entry(name)


def compare_audio(
    left: Sequence[GenerationResult], right: Sequence[GenerationResult], *, mode: Mode
) -> dict[str, float]:
    """Returns the difference between the clips of two lists of results, in which results correspond.

    Compares the first clip of each result. Raises VoidError for a larger difference than the engine's `mode` allows.
    """
    clips = [[result.audio[0] for result in results] for results in (left, right)]
    return compare(clips[0], {"engine": clips[1]}, bound=_LARGEST_DIFFERENCE[mode])["engine"]
