"""A step whose rows are packed without padding equals the padded step. A packed step's graph also fits other rows."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from stable_audio_serve.core.generation import GenerationRequest
from stable_audio_serve.engine import Engine, EngineOptions
from stable_audio_serve.engine.calls.packed_step import PackedShape, run_packed_step
from stable_audio_serve.engine.calls.step import StepRow
from stable_audio_serve.engine.calls.warmup import WarmUp
from stable_audio_serve.engine.hardware.arena import SCRATCH_PAGE
from stable_audio_serve.engine.scheduling.batching import (
    PackedGraphs,
)
from stable_audio_serve.engine.scheduling.cost import CostModel
from stable_audio_serve.models.blocks.varlen import is_varlen_correct
from stable_audio_serve.models.families import load_model
from stable_audio_serve.models.protocol import DiffusionModel, StepBatch
from stable_audio_serve.models.registry import resolve_entry
from stable_audio_serve.sampling.noise import SeededNoise
from stable_audio_serve.verification.verify import BOUNDS
from tests.engine.capturing import MOST_ROUNDS, GraphCounts, RecordingDevice
from tests.engine.late_device import record
from tests.engine.step_bench import DEVICE, REQUESTS, Bench, tensors_of
from tests.factories import make_audio, make_request
from tests.goldens import load_open_goldens
from tests.models.loaded import loaded
from tests.models.packing import attend_varlen
from tests.parameters import slow

TOKENS = 768  # the capacity of packed calls
TOLERANCE = BOUNDS["denoiser"]
FAST_TOLERANCE = 2e-4  # allowed difference of a request's audio


@cache
def load_open(name: str) -> DiffusionModel:
    return load_model(resolve_entry(name, path=str(load_open_goldens(name).folder)))


@pytest.fixture(autouse=True)
def _kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stable_audio_serve.models.native.attend_packed", attend_varlen)


@pytest.fixture(params=["sharp-s", slow("sharp-l")])
def bench(request: pytest.FixtureRequest) -> Bench:
    return Bench(loaded(request.param))


def pack(bench: Bench, rows: Sequence[StepRow]) -> PackedShape:
    return PackedShape.packing(bench.shape(rows), tokens=TOKENS, num_prefix=bench.model.spec.num_prefix)


def step(bench: Bench, shape: PackedShape, buffer: Tensor) -> None:
    run_packed_step(bench.model.denoise, buffer, memories=bench.memories, shape=shape)


def registers(bench: Bench, rows: Sequence[StepRow]) -> Tensor:
    return bench.registers.memory[[page for row in rows for part in row.held.parts for page in part]].clone()


@pytest.mark.parametrize("kind", REQUESTS)
def test_a_packed_step_equals_the_padded_one(bench: Bench, kind: str) -> None:
    with torch.inference_mode():
        rows, others = bench.rows(REQUESTS[kind], evaluation=1), bench.rows(REQUESTS["plain"], evaluation=0)
        before, untouched = bench.registers.memory.clone(), bench.results(others)
        shape = bench.shape(rows)
        bench.step(shape, shape.write(rows, DEVICE))
        padded = registers(bench, rows)
        for packed in (pack(bench, rows), pack(bench, rows).general()):
            bench.registers.memory.copy_(before)
            step(bench, packed, packed.write(rows, DEVICE))
            torch.testing.assert_close(registers(bench, rows), padded, rtol=0, atol=TOLERANCE)
            assert bench.results(others) == untouched
        assert not torch.equal(padded, registers(bench, others)[: len(padded)])


@pytest.mark.parametrize(
    "kinds",
    [
        ("guided", "other guidance"),
        slow(("edited", "plain")),
        slow(("plain", "plain")),
        slow(("many registers", "plain")),
    ],
)
@pytest.mark.server
def test_replayed_packed_step_is_bit_identical_for_other_rows(bench: Bench, kinds: tuple[str, str]) -> None:
    with torch.inference_mode():
        first, second = (bench.rows(REQUESTS[kind], evaluation=evaluation) for evaluation, kind in enumerate(kinds))
        shapes = [pack(bench, rows) for rows in (first, second)]
        draws = any(shape.draws for shape in shapes)
        general = replace(shapes[0], draws=draws).general()
        # A NaN at the end of the test must come from a step, not from unused memory.
        bench.registers.memory.nan_to_num_()
        addresses = [memory.data_ptr() for memory in tensors_of(bench.memories)]
        before, buffer = bench.registers.memory.clone(), general.write((), DEVICE)
        replay = record(lambda: step(bench, general, buffer))
        own = pack(bench, second)
        bench.registers.memory.copy_(before)
        step(bench, own, own.write(second, DEVICE))
        expected, untouched = bench.results(second), bench.results(first)

        bench.registers.memory.copy_(before)
        buffer.copy_(general.write(first, DEVICE))
        replay()  # what earlier rows left in buffers must not matter
        bench.registers.memory.copy_(before)
        buffer.copy_(general.write(second, DEVICE))
        replay()
        assert bench.results(second) == expected
        assert bench.results(first) == untouched
        assert not bench.registers.memory[[page for page in range(len(before)) if page != SCRATCH_PAGE]].isnan().any()
        assert [memory.data_ptr() for memory in tensors_of(bench.memories)] == addresses


def test_a_step_without_rows_writes_no_register(bench: Bench) -> None:
    with torch.inference_mode():
        rows = bench.rows(REQUESTS["guided"], evaluation=0)
        before = bench.registers.memory.clone()
        shape = pack(bench, rows).general()
        step(bench, shape, torch.zeros(shape.num_inputs))
        before[SCRATCH_PAGE] = bench.registers.memory[SCRATCH_PAGE]
        assert torch.equal(bench.registers.memory.view(torch.int32), before.view(torch.int32))


def test_kernel_check_accepts_the_reference_and_rejects_wrong_ones() -> None:
    def check(varlen: Callable[..., Tensor]) -> bool:
        heads = {"num_heads": 4, "num_key_heads": 2, "head_width": 16}
        return is_varlen_correct(varlen, device=torch.device("cpu"), dtype=torch.float32, **heads)

    def ignoring_keys(*args: Tensor, seqused_k: Tensor, **kwargs: bool) -> Tensor:
        return attend_varlen(*args, seqused_k=args[3].diff() if args[3] is args[4] else seqused_k, **kwargs)

    def expecting_order(*args: Tensor, **kwargs: Tensor) -> Tensor:
        return attend_varlen(*args[:4], args[4].sort().values, *args[5:], **kwargs)

    assert check(attend_varlen)
    assert not check(ignoring_keys)
    assert not check(expecting_order)


def packing(model: DiffusionModel) -> PackedGraphs:
    """A batch policy that packs the rows, without padding, into calls of a few fixed shapes."""
    return PackedGraphs(lambda frames: 1e9, model.spec.num_prefix, model.spec.max_frames)


CLIP = make_audio(1.2, sample_rate_hz=1000)
CROWD = [
    make_request("rain", duration_s=0.2, seed=21, steps=2),
    make_request("a drone", duration_s=3.5, seed=22, steps=3),
    make_request("guided", duration_s=0.7, seed=6, steps=3, cfg_scale=3.0, negative_prompt="noise"),
    make_request("wind", duration_s=1.1, seed=7, steps=3, init_audio=CLIP, init_noise_level=0.6),
    make_request("birds", duration_s=1.0, seed=8, steps=3, inpaint_audio=CLIP, inpaint_regions_s=((0.3, 0.6),)),
]


async def generate(model: DiffusionModel, requests: Sequence[GenerationRequest], **fields: object) -> list[np.ndarray]:
    options = EngineOptions(mode="fast", torch_threads=1, warmup_budget_s=0.0, max_queue_s=1e6)
    async with Engine(model, options, **fields) as engine:  # type: ignore[arg-type]
        return [result.audio[0] for result in await asyncio.gather(*map(engine.generate, requests))]


@pytest.mark.parametrize(
    "name",
    ["tiny-small", slow("sharp-s"), slow("tiny-1.0")],
)
async def test_packed_rows_equal_rows_alone_before_and_after_a_capture(name: str) -> None:
    """Before the shapes repeat, steps run eagerly; later they are replayed as graphs."""
    model = loaded(name) if name.startswith("sharp") else load_open(name)
    alone = [(await generate(model, [request]))[0] for request in CROWD]
    device, metrics = RecordingDevice(), GraphCounts()
    options = EngineOptions(mode="fast", torch_threads=1, warmup_budget_s=0.0, max_queue_s=1e6)
    async with Engine(model, options, policy=packing(model), device=device, metrics=metrics) as engine:
        for _ in range(MOST_ROUNDS):
            results = await asyncio.gather(*map(engine.generate, CROWD))
            for result, expected in zip(results, alone, strict=True):
                np.testing.assert_allclose(result.audio[0], expected, rtol=0, atol=FAST_TOLERANCE)
            if await metrics.are_captured("denoise") and device.num_replays:
                break
    assert device.num_replays


def test_the_warm_up_times_packed_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches, cost = loaded("sharp-s"), list[StepBatch](), CostModel()
    denoise = model.denoise

    def note(batch: StepBatch) -> Tensor:
        batches.append(batch)
        return denoise(batch)

    monkeypatch.setattr(model, "denoise", note)
    WarmUp(
        model,
        cost,
        policy=packing(model),
        max_tokens=512,
        max_prompts=1,
        noise_factory=SeededNoise,
        device=RecordingDevice(),
        budget_s=0.5,
    ).run()
    assert batches
    assert all(batch.segments is not None for batch in batches)
    assert cost.call_ms("denoise", rows=1, frames=64) > 0.0
