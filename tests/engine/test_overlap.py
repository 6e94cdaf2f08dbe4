"""Text and windows beside the steps of other rows: the same audio, however late they are."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from stable_audio_serve.core.generation import GenerationRequest, GenerationResult
from stable_audio_serve.engine import Engine, EngineOptions
from tests.engine.late_device import LateDevice
from tests.factories import ToyModel, make_audio, make_request, make_unlike_requests

FAST_TOLERANCE = 1e-5  # as in tests of a crowd's bytes
PATIENCES = (None, 0, 1, 3)


def make_options(mode: str, **fields: object) -> EngineOptions:
    return EngineOptions(
        mode="strict" if mode == "strict" else "fast",
        warmup_budget_s=0.0,
        torch_threads=1,
        fixed_share=0.001,  # all rows step together
        **fields,  # type: ignore[arg-type]
    )


def make_crowd() -> list[GenerationRequest]:
    """Unlike rows twice, the second time with prompts that are known by then."""
    crowd = make_unlike_requests()
    again = [replace(request, seed=request.seed + 100) for request in crowd]
    edits = [
        make_request("rain", duration_s=1.9, seed=31, batch_size=2, init_audio=make_audio(1.9), init_noise_level=0.6),
        make_request("wind", duration_s=2.0, seed=32, inpaint_audio=make_audio(2.0), inpaint_regions_s=((0.5, 1.5),)),
        make_request("a drone", duration_s=2.4, seed=33, steps=2, priority="batch"),
    ]
    return [*crowd, *edits, *again]


def make_model(mode: str) -> ToyModel:
    """In fast mode rows have their own source encodings, in strict mode the rows of a request share them."""
    return ToyModel(noisy_source_encoder=mode == "fast")


async def run_alone(requests: Sequence[GenerationRequest], *, mode: str) -> list[GenerationResult]:
    async with Engine(make_model(mode), make_options(mode)) as engine:
        return [await engine.generate(request) for request in requests]


def assert_same(mode: str, results: Sequence[GenerationResult], expected: Sequence[GenerationResult]) -> None:
    tolerance = 0.0 if mode == "strict" else FAST_TOLERANCE
    for result, alone in zip(results, expected, strict=True):
        assert result.seeds == alone.seeds
        for audio, other in zip(result.audio, alone.audio, strict=True):
            np.testing.assert_allclose(audio, other, rtol=0, atol=tolerance)


@pytest.mark.parametrize("patience", PATIENCES)
@pytest.mark.parametrize("mode", ["strict", "fast"])
async def test_a_second_queue_that_is_late_changes_nothing(mode: str, patience: int | None) -> None:
    crowd = make_crowd()
    expected = await run_alone(crowd, mode=mode)
    device = LateDevice(patience=patience)
    async with Engine(make_model(mode), make_options(mode), device=device) as engine:
        results = await asyncio.gather(*map(engine.generate, crowd))
    assert device.num_late > 0 or patience == 0
    assert_same(mode, results, expected)
