"""The small reference checkpoints of Stable Audio 3 as loaded models. Each is loaded at most once in a process."""

from __future__ import annotations

from functools import cache

import torch

from stable_audio_serve.models.families import load_model
from stable_audio_serve.models.registry import resolve_entry
from stable_audio_serve.models.sa3.model import Sa3Model
from tests.goldens import SHARP, TINY, load_goldens
from tests.parameters import slow

FAMILY = [*SHARP, *map(slow, TINY)]


@cache
def loaded(name: str) -> Sa3Model:
    """Returns the reference checkpoint `name`, loaded on the CPU."""
    model = load_model(resolve_entry(name, path=str(load_goldens(name).folder)))
    assert isinstance(model, Sa3Model)
    return model


def assert_near(actual: torch.Tensor, expected: torch.Tensor, *, within: float) -> None:
    """Assert that the shapes are equal and that no value differs by more than `within`."""
    torch.testing.assert_close(actual, expected, atol=within, rtol=0)
