"""Adapters on a device that has no float64, such as the GPU of a Mac. The exact products are computed on the CPU then.

The device is simulated, see `tests.engine.stand_in_device`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from stable_audio_serve.models.adapters.fold import LayerSlot, fold
from tests.engine.host_work import run_apart
from tests.engine.stand_in_device import StandInDevice, StandInTensor, move
from tests.models.adapters.plain import TYPES, fit_chain, make_base, make_change

pytestmark = pytest.mark.server


class WithoutFloat64(StandInDevice):
    def run(self, operation: Any, *, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        result = super().run(operation, args=args, kwargs=kwargs)
        if isinstance(result, StandInTensor) and result.dtype == torch.float64:
            raise TypeError("this device does not support float64")
        return result


def differences(kind: str) -> list[str]:
    """Returns the layers that a chain of two adapters changes in another way on the device than on the CPU."""
    base = make_base()
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        changes = [make_change(base, kind), make_change(base, "dora-rows", seed=2, strength=0.5)]
        expected = fold(base, fit_chain(base, Path(folder), changes)).layers
        for layer in base.layers.values():
            move(layer)
        with WithoutFloat64():
            found = fold(base, fit_chain(base, Path(folder), changes)).layers
    return [name for name in expected if not _is_same(found[name], expected[name])]


def _is_same(found: LayerSlot, expected: LayerSlot) -> bool:
    parts = zip(found, expected, strict=True)
    return all(isinstance(one, StandInTensor) and torch.equal(one.held, other) for one, other in parts)


def test_adapters_need_no_float64_on_the_device() -> None:
    assert run_apart(differences, TYPES) == [[]] * len(TYPES)
