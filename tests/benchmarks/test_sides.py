"""The sides make the same audio by different schedules: on the toy checkpoint, and on a device that only takes time."""

from __future__ import annotations

import asyncio
import time

import numpy as np
import pytest

from benchmarks.sides import pipeline
from benchmarks.sides.batcher import Batcher
from benchmarks.sides.servers import batch_key, one_call, open_side
from benchmarks.sides.timed_model import TimedModel
from benchmarks.simulate.devices import LinearDevice
from benchmarks.workload import eight_mixed_requests
from stable_audio_serve.core.errors import InvalidRequestError
from stable_audio_serve.core.generation import GenerationRequest, GenerationResult
from stable_audio_serve.engine import EngineOptions
from stable_audio_serve.engine.batching import Lane
from tests.engine.test_step import RecordingDevice
from tests.factories import ToyModel, make_request

pytestmark = pytest.mark.slow
STRICT = EngineOptions(mode="strict", torch_threads=1, warmup_budget_s=0.0)


async def generate(name: str, requests: list[GenerationRequest]) -> list[GenerationResult]:
    side = open_side(name, ToyModel(), options=STRICT)
    try:
        return await asyncio.gather(*map(side.generate, requests))
    finally:
        await side.close()


async def test_the_lock_makes_the_engines_bytes() -> None:
    requests = eight_mixed_requests(ToyModel().spec.card)
    for lock, ours in zip(await generate("lock", requests), await generate("ours-strict", requests), strict=True):
        assert np.array_equal(lock.audio[0], ours.audio[0])
        assert (lock.seeds, lock.sample_rate_hz) == (ours.seeds, ours.sample_rate_hz)
        assert lock.timings.total_ms >= lock.timings.queue_ms + lock.timings.denoise_ms > 0


@pytest.mark.parametrize("name", ["lock", "static"])
async def test_where_the_engine_captures_steps_the_others_do(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = eight_mixed_requests(ToyModel().spec.card)
    expected = await generate(name, requests)
    device = RecordingDevice()
    monkeypatch.setattr(pipeline, "open_device", lambda *_, **__: device)
    side = open_side(name, ToyModel(), options=STRICT)
    for _ in range(2):
        await asyncio.gather(*map(side.generate, requests))
        await side.settle()
    replays, misses = device.num_replays, side.captures.num_misses  # memory that grows would drop the captures
    results = await asyncio.gather(*map(side.generate, requests))
    await side.close()
    assert device.num_replays > replays
    assert side.captures.num_misses == misses
    assert side.captures.num_captured > 0
    for result, before in zip(results, expected, strict=True):
        assert np.abs(result.audio[0] - before.audio[0]).max() < 1e-5


async def test_the_eager_lock_captures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    device = RecordingDevice()
    monkeypatch.setattr(pipeline, "open_device", lambda *_, **__: device)
    side = open_side("eager-lock", ToyModel(), options=STRICT)
    for seed in range(3):
        await side.generate(make_request(duration_s=1.0, seed=seed))
    await side.settle()
    await side.close()
    assert (side.captures.num_captured, side.captures.num_misses, device.num_replays) == (0, 0, 0)


@pytest.mark.parametrize(("rows", "size"), [(1, 1), (5, 6), (33, 48), (64, 64)])
def test_a_captured_batch_has_one_of_few_shapes(rows: int, size: int) -> None:
    device = RecordingDevice()
    device.frame_grid = 64
    policy = one_call(ToyModel())(device)
    call = policy.split([Lane(1, 70)] * (rows - 1) + [Lane(1, 130)])[0]
    assert (call.members, call.rows, call.frames) == (tuple(range(rows)), size, 192)


async def test_static_batches_of_like_requests_make_nearly_the_same() -> None:
    requests = [*eight_mixed_requests(ToyModel().spec.card)]
    requests += [make_request(f"like {seed}", duration_s=1.0 + seed / 100, seed=seed) for seed in range(4)]
    for static, lock in zip(await generate("static", requests), await generate("lock", requests), strict=True):
        assert np.abs(static.audio[0] - lock.audio[0]).max() < 1e-5


async def test_a_batch_holds_only_like_requests() -> None:
    model = ToyModel()
    one = make_request(duration_s=1.0, steps=8)
    assert batch_key(model, one) == batch_key(model, make_request("another prompt", duration_s=1.01, seed=5, steps=8))
    for other in ({"duration_s": 2.0}, {"steps": 9}, {"cfg_scale": 3.0}, {"sampler": "euler"}):
        assert batch_key(model, one) != batch_key(model, make_request(**{"duration_s": 1.0, "steps": 8, **other}))


async def test_a_batch_waits_shortly_and_the_next_forms_while_it_runs() -> None:
    batches: list[list[int]] = []
    has_begun, may_end = asyncio.Event(), asyncio.Event()

    async def run(items: list[int]) -> list[int]:
        batches.append(items)
        has_begun.set()
        await may_end.wait()
        return [10 * item for item in items]

    batcher = Batcher(run, max_size=4, wait_s=0.01)
    first = [asyncio.create_task(batcher(item)) for item in range(6)]
    await has_begun.wait()
    later = [asyncio.create_task(batcher(item)) for item in (6, 7)]
    await asyncio.sleep(0)
    may_end.set()
    assert await asyncio.gather(*first, *later) == [10 * item for item in range(8)]
    assert batches == [[0, 1, 2, 3], [4, 5, 6, 7]]


async def test_an_error_reaches_every_call_of_its_batch_and_no_other() -> None:
    async def run(items: list[int]) -> list[int]:
        if 1 in items:
            raise RuntimeError("broken")
        return items

    batcher = Batcher(run, max_size=2, wait_s=0.01)
    outcomes = await asyncio.gather(*map(batcher, range(4)), return_exceptions=True)
    assert [str(outcome) for outcome in outcomes] == ["broken", "broken", "2", "3"]


async def test_a_timed_model_takes_its_time_and_every_step_is_heard() -> None:
    model = TimedModel(LinearDevice(step_fixed_ms=20.0, step_per_frame_ms=0.0, coding_fixed_ms=10.0))
    side = open_side("lock", model, options=STRICT)
    started_at = time.perf_counter()
    eight = await side.generate(make_request(duration_s=2.0, steps=8))
    assert time.perf_counter() - started_at >= 0.17
    seven = await side.generate(make_request(duration_s=2.0, steps=7))
    other = await side.generate(make_request("another", duration_s=2.0, steps=8))
    await side.close()
    assert eight.audio[0].shape == (2, 2 * 689)
    for changed in (seven, other):
        difference = changed.audio[0] - eight.audio[0]
        assert np.sqrt((difference**2).mean() / (eight.audio[0] ** 2).mean()) > 0.01


async def test_a_refusal_reaches_its_caller() -> None:
    side = open_side("static", ToyModel(), options=STRICT)
    with pytest.raises(InvalidRequestError):
        await side.generate(make_request(duration_s=1e6))
    await side.close()
    with pytest.raises(ValueError, match="lock, static"):
        open_side("other", ToyModel(), options=STRICT)
