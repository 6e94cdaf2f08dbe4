"""Sampling steps replayed as CUDA graphs give the same bytes as eager steps, in any order and with any other rows."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import torch

from benchmarks.sides.pipeline import Captures, wait_for_captures
from stable_audio_serve.core.generation import GenerationResult
from stable_audio_serve.engine import Engine, EngineOptions
from tests.engine.test_checkpoint_independence import SUBJECTS, make_neighbours
from tests.gpu.loaded import CHECKPOINTS, load_on, open_for

pytestmark = pytest.mark.gpu

OPTIONS = EngineOptions(mode="strict", warmup_budget_s=0.0)


async def play(engine: Engine, *, in_crowd: bool) -> list[GenerationResult]:
    if not in_crowd:
        return [await engine.generate(subject) for subject in SUBJECTS.values()]
    return await asyncio.gather(*map(engine.generate, (*SUBJECTS.values(), *make_neighbours())))


async def play_without(device: torch.device, name: str, dtype: torch.dtype) -> list[GenerationResult]:
    plain = open_for(device)
    plain.can_capture = False
    async with Engine(load_on(device, name, dtype), OPTIONS, device=plain) as engine:
        return await play(engine, in_crowd=False)


@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_captured_steps_make_the_same_bytes(device: torch.device, name: str, dtype: torch.dtype) -> None:
    if device.type != "cuda" and dtype != torch.float32:
        pytest.skip("only a GPU is made for it")
    captures, opened = Captures(), open_for(device)

    async def run() -> list[list[GenerationResult]]:
        async with Engine(load_on(device, name, dtype), OPTIONS, metrics=captures, device=opened) as engine:
            for in_crowd in (True, False):
                await play(engine, in_crowd=in_crowd)
                await play(engine, in_crowd=in_crowd)
                await asyncio.wait_for(wait_for_captures(captures), 90.0)
            missed = captures.num_misses
            results = [await play(engine, in_crowd=False) for _ in range(2)]
            assert captures.num_misses == missed
            return [*results, await play(engine, in_crowd=True)]

    expected = asyncio.run(play_without(device, name, dtype))
    assert all(np.abs(result.audio[0]).max() > 0.01 for result in expected)
    for results in asyncio.run(run()):
        for result, alone in zip(results, expected, strict=False):
            np.testing.assert_array_equal(result.audio[0], alone.audio[0])
    assert (captures.num_captured > 0) == opened.can_capture
