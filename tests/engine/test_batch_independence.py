"""The same request gives the same audio, alone and with any other requests."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from stable_audio_serve.core.generation import GenerationRequest, GenerationResult
from stable_audio_serve.engine import Engine, EngineOptions
from stable_audio_serve.engine.scheduling.batching import FixedSlots
from tests.engine.test_engine import Gate, submit
from tests.factories import ToyModel, make_audio, make_request, make_varied_requests
from tests.parameters import some
from tests.patience import PATIENCE_S

# For fast mode. The largest difference observed with the toy model on a CPU is 3e-7. For comparison, the last bit of
# 16-bit audio is 3e-5.
FAST_TOLERANCE = 1e-5

SUBJECTS = {
    "text": make_request(duration_s=0.9, seed=5),
    "guided": make_request(duration_s=0.6, seed=5, cfg_scale=4.0, negative_prompt="noise", steps=6),
    "variation": make_request(duration_s=0.9, seed=5, init_audio=make_audio(0.9), init_noise_level=0.5),
    "inpaint": make_request(seed=5, inpaint_audio=make_audio(0.4), inpaint_regions_s=((0.1, 0.2),)),
    "several": make_request(duration_s=0.6, seed=5, batch_size=3, sampler="dpmpp"),
}


def make_options(mode: str, **fields: object) -> EngineOptions:
    if mode == "packed":
        mode, fields = "fast", {"fixed_share": 0.001, **fields}
    elif mode == "fast":  # with these fields, all rows share every call
        fields = {"frame_grid": 256, "fixed_share": 0.001, **fields}
    return EngineOptions(mode=mode, warmup_budget_s=0.0, torch_threads=1, **fields)  # type: ignore[arg-type]


def make_model(mode: str = "strict") -> ToyModel:
    return ToyModel(noisy_source_encoder=True, packs_rows=mode == "packed")


async def run_alone(request: GenerationRequest, *, options: EngineOptions, mode: str = "strict") -> GenerationResult:
    async with Engine(make_model(mode), options) as engine:
        return await engine.generate(request)


async def run_after_some_steps(
    engine: Engine, crowd: Sequence[GenerationRequest]
) -> list[asyncio.Task[GenerationResult]]:
    """Start the requests, and wait until the engine has run a sampling step. Returns the requests' tasks."""
    moving = asyncio.Event()
    tasks = [
        asyncio.create_task(engine.generate(r, lambda progress: moving.set() if progress.steps_done else None))
        for r in crowd
    ]
    await asyncio.wait_for(moving.wait(), PATIENCE_S)
    return tasks


def largest_difference(left: GenerationResult, right: GenerationResult) -> float:
    assert left.seeds == right.seeds
    return max(float(np.abs(a - b).max()) for a, b in zip(left.audio, right.audio, strict=True))


MODES = ("strict", "fast", "packed")


def assert_same(mode: str, result: GenerationResult, alone: GenerationResult) -> None:
    assert all(np.abs(audio).max() > 0.01 for audio in alone.audio)
    assert largest_difference(result, alone) <= (0.0 if mode == "strict" else FAST_TOLERANCE)


ALONE: dict[str, list[GenerationResult]] = {}  # by mode


async def run_each_alone(mode: str) -> list[GenerationResult]:
    if mode not in ALONE:
        options = make_options(mode)
        ALONE[mode] = [await run_alone(subject, options=options, mode=mode) for subject in SUBJECTS.values()]
    return ALONE[mode]


def assert_all_same(mode: str, results: Sequence[GenerationResult], alone: Sequence[GenerationResult]) -> None:
    for result, own in zip(results, alone, strict=True):
        assert_same(mode, result, own)


@pytest.mark.parametrize("mode", MODES)
async def test_different_neighbours_do_not_change_the_audio(mode: str) -> None:
    async with Engine(make_model(mode), make_options(mode)) as engine:
        crowd = make_varied_requests()
        results = await asyncio.gather(*map(engine.generate, [*crowd[:4], *SUBJECTS.values(), *crowd[4:]]))
    assert_all_same(mode, results[4 : 4 + len(SUBJECTS)], await run_each_alone(mode))


@pytest.mark.parametrize("mode", some(MODES, ("strict", "packed")))
async def test_late_joiners_get_the_same_audio_as_alone(mode: str) -> None:
    async with Engine(make_model(mode), make_options(mode)) as engine:
        tasks = await run_after_some_steps(engine, make_varied_requests())
        results = await asyncio.gather(*map(engine.generate, SUBJECTS.values()))
        await asyncio.gather(*tasks)
    assert_all_same(mode, results, await run_each_alone(mode))


@pytest.mark.parametrize("mode", some(MODES, ("strict", "packed")))
async def test_cancelled_neighbours_do_not_change_the_audio(mode: str) -> None:
    async with Engine(make_model(mode), make_options(mode)) as engine:
        tasks = await run_after_some_steps(engine, make_varied_requests())
        own = [asyncio.create_task(engine.generate(subject)) for subject in SUBJECTS.values()]
        await asyncio.sleep(0)
        for task in tasks[::2]:
            task.cancel()
        results = await asyncio.gather(*own)
        await asyncio.gather(*tasks, return_exceptions=True)
    assert_all_same(mode, results, await run_each_alone(mode))


@pytest.mark.parametrize("mode", some(MODES, ("strict", "fast")))
async def test_priority_does_not_change_the_audio(mode: str) -> None:
    """With mixed priorities, a request shares its steps with others, waits for others, or runs alone."""
    fields = {"max_rows": 4, "batch_share": 0.5}
    own = [replace(subject, priority="batch") for subject in SUBJECTS.values()]
    batch = [replace(request, priority="batch") for request in make_varied_requests()]
    async with Engine(make_model(mode), make_options(mode, **fields)) as engine:
        tasks = await run_after_some_steps(engine, batch)
        results = await asyncio.gather(*map(engine.generate, [*own, *SUBJECTS.values(), *make_varied_requests()]))
        await asyncio.gather(*tasks)
    alone = await run_each_alone(mode)
    assert_all_same(mode, results[: 2 * len(own)], [*alone, *alone])


@pytest.mark.parametrize("mode", ["fast", "packed"])
async def test_fast_mode_really_shares_calls(mode: str) -> None:
    rows_per_call: list[int] = []
    gate = Gate()

    def on_call(name: str, items: Sequence[object]) -> None:
        if name == "denoise":
            rows_per_call.append(len(items))
        gate(name, items)

    model = ToyModel(on_call=on_call, packs_rows=mode == "packed")
    first, *others = make_varied_requests()
    async with Engine(model, make_options(mode)) as engine:
        tasks = [asyncio.create_task(engine.generate(first))]
        await gate.reached()  # the engine's thread stands still until all requests have arrived
        tasks += [await submit(engine, request) for request in others]
        gate.open()
        await asyncio.gather(*tasks)
    assert max(rows_per_call) > 8


async def test_prompt_cache_changes_no_byte() -> None:
    request = make_request(duration_s=0.5, cfg_scale=2.0, negative_prompt="hum")
    uncached = await run_alone(request, options=make_options("strict", prompt_cache_bytes=0))
    async with Engine(make_model(), make_options("strict")) as engine:
        first = await engine.generate(request)
        second = await engine.generate(request)
    assert largest_difference(first, uncached) == 0.0
    assert largest_difference(second, uncached) == 0.0


@pytest.mark.parametrize("noisy_source_encoder", [False, True])
async def test_variations_equal_single_requests_with_their_seeds(noisy_source_encoder: bool) -> None:
    fields = {"duration_s": 0.6, "init_audio": make_audio(0.6), "init_noise_level": 0.7}
    async with Engine(ToyModel(noisy_source_encoder=noisy_source_encoder), make_options("strict")) as engine:
        together = await engine.generate(make_request(seed=20, batch_size=3, **fields))
        singles = [await engine.generate(make_request(seed=seed, **fields)) for seed in (20, 21, 22)]
    assert together.seeds == (20, 21, 22)
    for index, single in enumerate(singles):
        np.testing.assert_array_equal(together.audio[index], single.audio[0])


@pytest.mark.parametrize("prompt_cache_bytes", [0, 1 << 20])
@pytest.mark.parametrize("cfg_scale", [1.0, 3.0])
async def test_variations_equal_single_requests_with_their_prompts(prompt_cache_bytes: int, cfg_scale: float) -> None:
    fields = {"duration_s": 0.6, "cfg_scale": cfg_scale, "negative_prompt": "hum"}
    prompts, seeds = ("rain", "a much longer prompt about wind", "rain", ""), (7, 7, 2**63 - 1, 0)
    several = make_request(
        prompt=prompts[0], seed=7, batch_size=4, variation_prompts=prompts, variation_seeds=seeds, **fields
    )
    async with Engine(ToyModel(), make_options("strict", prompt_cache_bytes=prompt_cache_bytes)) as engine:
        together = await engine.generate(several)
        singles = [
            await engine.generate(make_request(prompt=prompt, seed=seed, **fields))
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
    assert together.seeds == seeds
    for index, single in enumerate(singles):
        np.testing.assert_array_equal(together.audio[index], single.audio[0])


async def test_fixed_slots_change_no_byte() -> None:
    """If each call has a fixed number of rows, the other rows in the call, even dummy rows, change no byte."""
    policy = FixedSlots(slots=4, grid=16)
    async with Engine(make_model(), make_options("strict"), policy=policy) as engine:
        alone = await engine.generate(SUBJECTS["guided"])
    async with Engine(make_model(), make_options("strict"), policy=policy) as engine:
        similar = [make_request(duration_s=0.6, seed=seed, steps=9) for seed in range(30, 36)]
        results = await asyncio.gather(*map(engine.generate, [*similar, SUBJECTS["guided"], *make_varied_requests()]))
    assert largest_difference(results[6], alone) == 0.0
