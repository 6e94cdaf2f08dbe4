"""The predicted memory of rows equals hand-computed values and measured values. Rows wait if memory is too small."""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stable_audio_serve.core.errors import InvalidRequestError
from stable_audio_serve.core.generation import GenerationRequest, Mode
from stable_audio_serve.engine import Engine, EngineOptions
from stable_audio_serve.engine.hardware.share import MemoryPlan
from stable_audio_serve.engine.scheduling.memory import (
    MemoryUse,
    RowMemory,
    RowNeeds,
    RowShape,
    example_conditioning,
    measure_use,
    peak_bytes,
    plan_share,
    row_shape,
)
from stable_audio_serve.engine.scheduling.scheduler import RowId, RowWork, Scheduler, SchedulerLimits
from stable_audio_serve.models.protocol import DecodeWindow, DiffusionModel
from stable_audio_serve.sampling.noise import SeededNoise
from tests.engine.capturing import RecordingDevice
from tests.factories import ToyModel, make_request, make_varied_requests
from tests.goldens import SHARP
from tests.models.loaded import loaded

MB = 1_000_000


def measure(model: DiffusionModel) -> MemoryUse:
    plan = plan_share(model, 1 / 16)
    return measure_use(model, example_conditioning(model, plan), frames=plan.frames, noise=SeededNoise(0))


def test_needs_of_a_row_are_pages_slots_and_largest_call() -> None:
    use = MemoryUse(4 * 8, branch=1000.0, branch_frame=10.0, denoise_frame=50.0, encode_frame=7.0, decode_frame=200.0)
    shape = RowShape(frames=100, num_parts=2, num_branches=2, encode_window=100, decode_window=64)
    own = 4 * 8 * 100 * (2 * 2 + 6)  # 4 bytes, 8 latent channels, 100 frames: the step's own tensors
    decode = 64 * 200
    step = 2 * (1000 + 100 * (50 + 2 * 10))  # two branches: copies of the conditioning, and the network's tensors
    needs = use.needs(shape)
    assert needs == RowNeeds(pages=2 * 2, slots=2, frame_pages=2 * 2, call_bytes=own + max(step, 100 * 7, decode))
    assert use.needs(replace(shape, num_branches=1)).call_bytes == own + decode
    registers, context = 4 * 64 * 4 * 8, 2 * 1000 + 4 * 64 * 10  # pages have 64 frames
    assert use.num_bytes(needs) == registers + context + needs.call_bytes


def test_only_rows_that_edit_take_pages_of_edits() -> None:
    use = MemoryUse(edit_frame=5.0)
    shape = RowShape(frames=64, num_parts=1, num_branches=1, encode_window=0, decode_window=1)
    assert use.needs(shape).edit_pages == 0
    assert use.needs(replace(shape, is_edited=True)).edit_pages == 1


def test_simultaneous_temporaries_add_up() -> None:
    x = torch.zeros(1000)

    def run() -> torch.Tensor:
        a = x + 1  # 4000 bytes
        b = a * 2  # 8000 bytes in total
        del a
        view = b[:10]  # a view takes no memory
        view.add_(1)
        c = torch.cat([b, b])  # 8000 bytes, in addition to the 4000 of b
        return c.sum() + x.sum()

    assert 12_000 <= peak_bytes(run) <= 12_100
    assert peak_bytes(lambda: x.view(10, 100)) == 0


@pytest.mark.parametrize("name", ["linear", "conv"])
def test_memory_of_a_layer_is_its_output(name: str) -> None:
    layer = torch.nn.Linear(8, 16) if name == "linear" else torch.nn.Conv1d(8, 16, 3, padding=1)
    x = torch.zeros(1, 50, 8) if name == "linear" else torch.zeros(1, 8, 50)
    with torch.inference_mode():
        assert 4 * 16 * 50 <= peak_bytes(lambda: layer(x)) <= 3 * 4 * 16 * 50


def test_memory_of_the_toy_model_matches_its_arithmetic() -> None:
    model = ToyModel(width=16, latent_channels=4, hop=8)
    with torch.inference_mode():
        use = measure(model)
    assert use.branch == pytest.approx(4 * 16)  # the prompt's values: float32, width 16
    assert use.branch_frame == pytest.approx(4 * 16)  # the conditioning added to each frame: float32, width 16
    assert use.decode_frame >= 4 * 2 * 8  # the audio: float32, two channels, eight samples
    assert use.denoise_frame >= 4 * 3 * 16  # queries, keys and values


@pytest.mark.parametrize("name", SHARP)
def test_memory_of_small_windows_predicts_long_ones(name: str) -> None:
    model = loaded(name)
    latents = torch.zeros(model.spec.card.latent_channels, 256)
    with torch.inference_mode():
        use = measure(model)
        taken = peak_bytes(lambda: model.decode([DecodeWindow(latents, 0, SeededNoise(0))]))
    assert 0.85 * 256 * use.decode_frame <= taken <= 1.02 * 256 * use.decode_frame


def test_without_a_limit_everything_fits() -> None:
    memory = RowMemory(ToyModel().spec, MemoryPlan(), max_rows=4, is_fixed=True)
    (plan,) = ToyModel().plan(make_request())
    assert memory.row_bytes(plan) == 0
    memory.check(plan, make_request())


def make_scheduler(max_bytes: int, **limits: object) -> Scheduler:
    return Scheduler(
        SchedulerLimits(max_bytes=max_bytes, **limits),  # type: ignore[arg-type]
        knee_tokens=lambda frames: 1e9,
        step_ms=lambda works, num_new: 1.0,
    )


def add(scheduler: Scheduler, row_id: int, num_bytes: int, *, at: float = 0.0, priority: str = "interactive") -> None:
    scheduler.add(
        RowId(row_id),
        RowWork(10, branches=[1] * 8),
        arrived_at=at,
        alone_s=1.0,
        priority=priority,  # type: ignore[arg-type]
        num_bytes=num_bytes,
    )


def test_rows_start_while_there_is_memory() -> None:
    scheduler = make_scheduler(100)
    for row_id in range(4):
        add(scheduler, row_id, 40, at=row_id)
    assert scheduler.pick() == [0, 1]
    scheduler.remove(RowId(0))
    assert scheduler.pick() == [1, 2]


def test_small_rows_do_not_overtake_a_row_waiting_for_memory() -> None:
    scheduler = make_scheduler(100)
    add(scheduler, 0, 60)
    add(scheduler, 1, 90, at=1.0)
    add(scheduler, 2, 10, at=2.0)
    add(scheduler, 3, 10, priority="batch")
    assert scheduler.pick() == [0]
    scheduler.remove(RowId(0))
    assert scheduler.pick() == [1, 2]
    scheduler.remove(RowId(1))
    assert scheduler.pick() == [2, 3]


def test_batch_rows_that_hold_memory_continue_until_others_fit() -> None:
    scheduler = make_scheduler(100)
    add(scheduler, 0, 60, priority="batch")
    add(scheduler, 1, 60, priority="batch")
    assert scheduler.pick() == [0]
    add(scheduler, 2, 60)
    assert scheduler.pick() == [0]
    scheduler.remove(RowId(0))
    assert scheduler.pick() == [2]


@given(
    rows=st.lists(st.tuples(st.integers(1, 100), st.sampled_from(["interactive", "batch"])), min_size=1, max_size=20)
)
def test_every_row_ends_within_the_bound(rows: list[tuple[int, str]]) -> None:
    scheduler = make_scheduler(100, max_started=6)
    left, started = {}, set[RowId]()
    for row_id, (num_bytes, priority) in enumerate(rows):
        add(scheduler, row_id, num_bytes, at=row_id / 10, priority=priority)
        left[RowId(row_id)] = 3
    for _ in range(10 * len(rows)):
        for row_id in scheduler.pick():
            started.add(row_id)
            left[row_id] -= 1
            if not left[row_id]:
                scheduler.remove(row_id)
                del left[row_id]
                started.remove(row_id)
        assert sum(rows[row_id][0] for row_id in started) <= 100
    assert not left


def bytes_of(request: GenerationRequest) -> int:
    """Returns the smallest memory for rows, in bytes, in which one row of this request fits."""
    model = ToyModel()

    def fits(num_bytes: int) -> bool:
        memory = RowMemory(model.spec, MemoryPlan(rows=num_bytes), max_rows=64, is_fixed=True)
        with torch.inference_mode():
            memory.measure(model, SeededNoise)
        return memory.row_bytes(model.plan(request)[0]) <= num_bytes

    return bisect_left(range(10_000_000), True, lo=20_000, key=fits)


def make_engine(max_bytes: int, on_call: Callable[..., None] = lambda name, items: None) -> Engine:
    options = EngineOptions(mode="fast", warmup_budget_s=0.0, torch_threads=1, max_memory_bytes=max_bytes)
    return Engine(ToyModel(on_call=on_call), options)


class CallSizes:
    """Notes the largest number of rows in a call of the denoiser."""

    def __init__(self) -> None:
        self.most = 0

    def __call__(self, name: str, items: Sequence[object]) -> None:
        if name == "denoise":
            self.most = max(self.most, len(items))


async def test_rows_wait_for_memory_instead_of_failing() -> None:
    request = make_request(duration_s=1.5, batch_size=16)  # one request, because its clips arrive at the same time
    sizes = CallSizes()
    async with make_engine(int(2.5 * bytes_of(request)), sizes) as engine:
        waited = await engine.generate(request)
    assert sizes.most == 2
    async with make_engine(10**9, sizes) as engine:
        free = await engine.generate(request)
    assert sizes.most >= 4
    for own, other in zip(waited.audio, free.audio, strict=True):
        np.testing.assert_allclose(own, other, atol=1e-5)


async def test_a_clip_that_never_fits_is_refused_with_the_range_that_does() -> None:
    most = bytes_of(make_request(duration_s=1.0))
    async with make_engine(most) as engine:
        with pytest.raises(InvalidRequestError, match="max_memory_bytes") as refusal:
            await engine.generate(make_request(duration_s=2.0))
        assert refusal.value.field == "duration"
        longest_s = float(str(refusal.value.allowed).removeprefix("0.."))
        assert longest_s == pytest.approx(1.0, abs=0.05)
        await engine.generate(make_request(duration_s=longest_s - 0.02))


def test_fixed_windows_count_only_planned_windows_as_memory() -> None:
    (plan,) = ToyModel().plan(make_request(duration_s=2.0))
    assert row_shape(plan, is_fixed=True).decode_window == 32
    assert row_shape(plan, is_fixed=False).decode_window == plan.frames


async def test_any_mix_of_rows_fits_arenas_of_a_fixed_size() -> None:
    """If an arena were too small, a row that needs one more page or slot would fail."""
    requests = [replace(each, seed=each.seed + 100 * turn) for turn in range(2) for each in make_varied_requests()]
    options = EngineOptions(mode="strict", warmup_budget_s=0.0, torch_threads=1)
    async with Engine(ToyModel(), options) as engine:
        expected = await asyncio.gather(*map(engine.generate, requests))
    sizes: list[tuple[Mode, int]] = [("strict", 800_000), ("fast", 800_000), ("fast", 3_000_000)]
    for mode, num_bytes in sizes:
        limited = replace(options, mode=mode, max_memory_bytes=num_bytes)
        async with Engine(ToyModel(), limited, device=RecordingDevice()) as engine:
            results = await asyncio.gather(*map(engine.generate, requests))
            parts = engine.memory.parts()
        assert sum(parts[name] for name in ("context", "rows", "decode")) == num_bytes
        assert parts["context"] > 0
        for result, free in zip(results, expected, strict=True):
            for own, other in zip(result.audio, free.audio, strict=True):
                np.testing.assert_allclose(own, other, atol=0.0 if mode == "strict" else 1e-5)
