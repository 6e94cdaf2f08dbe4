"""Text and decode calls on a second CUDA stream do not change the audio, however late the stream does its work."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise

import numpy as np
import pytest

from stable_audio_serve.core.errors import GenerationError, ModelUnavailableError
from stable_audio_serve.core.generation import GenerationRequest, GenerationResult
from stable_audio_serve.engine import Engine, EngineOptions
from stable_audio_serve.engine.calls import stages
from stable_audio_serve.engine.scheduling import windows
from stable_audio_serve.models.protocol import DecodeWindow
from stable_audio_serve.models.windows import cut_windows
from stable_audio_serve.sampling.noise import SeededNoise
from tests.engine.late_device import LateDevice
from tests.engine.two_queues import TwoQueues
from tests.factories import FakeClock, ToyModel, make_audio, make_request, make_varied_requests
from tests.parameters import slow
from tests.patience import PATIENCE_S

pytestmark = pytest.mark.server

FAST_TOLERANCE = 1e-5
PATIENCES = (None, 1)


def make_options(mode: str, **fields: object) -> EngineOptions:
    return EngineOptions(
        mode="strict" if mode == "strict" else "fast",
        warmup_budget_s=0.0,
        torch_threads=1,
        fixed_share=0.001,  # makes all rows share every step
        **fields,  # type: ignore[arg-type]
    )


def make_crowd() -> list[GenerationRequest]:
    """Returns varied requests, edits, and the varied requests with other seeds. The last ones have cached prompts."""
    crowd = make_varied_requests()
    again = [replace(request, seed=request.seed + 100) for request in crowd]
    edits = [
        make_request("rain", duration_s=1.9, seed=31, batch_size=2, init_audio=make_audio(1.9), init_noise_level=0.6),
        make_request("wind", duration_s=2.0, seed=32, inpaint_audio=make_audio(2.0), inpaint_regions_s=((0.5, 1.5),)),
        make_request("a drone", duration_s=2.4, seed=33, steps=2, priority="batch"),
    ]
    return [*crowd, *edits, *again]


def make_model(mode: str) -> ToyModel:
    """Returns a toy model. It encodes source audio once per row in fast mode, and once for all rows in strict mode."""
    return ToyModel(noisy_source_encoder=mode == "fast")


ALONE: dict[str, list[GenerationResult]] = {}  # by mode


async def run_alone(mode: str) -> list[GenerationResult]:
    """Returns the audio of each request of `make_crowd`, generated alone."""
    if mode not in ALONE:
        async with Engine(make_model(mode), make_options(mode)) as engine:
            ALONE[mode] = [await engine.generate(request) for request in make_crowd()]
    return ALONE[mode]


def assert_same(mode: str, results: Sequence[GenerationResult], expected: Sequence[GenerationResult]) -> None:
    tolerance = 0.0 if mode == "strict" else FAST_TOLERANCE
    for result, alone in zip(results, expected, strict=True):
        assert result.seeds == alone.seeds
        for audio, other in zip(result.audio, alone.audio, strict=True):
            np.testing.assert_allclose(audio, other, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("mode", "patience"),
    [("strict", PATIENCES[0]), slow("fast", PATIENCES[1]), slow("strict", PATIENCES[1]), slow("fast", PATIENCES[0])],
)
async def test_a_late_second_queue_does_not_change_the_audio(mode: str, patience: int | None) -> None:
    crowd, expected = make_crowd(), await run_alone(mode)
    device = LateDevice(patience=patience)
    async with Engine(make_model(mode), make_options(mode), device=device) as engine:
        results = await asyncio.gather(*map(engine.generate, crowd))
    assert device.num_late > 0
    assert_same(mode, results, expected)


class PoisonedNoise(SeededNoise):
    """The noise of the row that should fail. Tests recognise the row's decode windows by this class."""


def make_noise(seed: int) -> SeededNoise:
    return PoisonedNoise(seed) if seed == 666 else SeededNoise(seed)


def break_poisoned(name: str, items: Sequence[object]) -> None:
    if any(item == "poison" or isinstance(getattr(item, "noise", None), PoisonedNoise) for item in items):
        raise RuntimeError(f"{name} broke")


@pytest.mark.parametrize(
    "poison",
    [
        make_request("poison", seed=1),
        make_request(seed=666, duration_s=1.9),
        make_request(seed=666, duration_s=1.9, init_audio=make_audio(1.9), init_noise_level=0.5),
    ],
    ids=["text", "decode", "encode"],
)
async def test_a_row_that_fails_in_the_second_queue_fails_alone(poison: GenerationRequest) -> None:
    crowd = make_varied_requests()
    expected = (await run_alone("fast"))[: len(crowd)]
    model = ToyModel(noisy_source_encoder=True, on_call=break_poisoned)
    async with Engine(model, make_options("fast"), device=LateDevice(), noise_factory=make_noise) as engine:
        *results, failed = await asyncio.gather(*map(engine.generate, [*crowd, poison]), return_exceptions=True)
    assert isinstance(failed, GenerationError)
    assert_same("fast", [result for result in results if not isinstance(result, BaseException)], expected)


@pytest.mark.parametrize("mode", ["strict", slow("fast")])
async def test_rows_cancelled_in_the_second_queue_do_not_affect_others(mode: str) -> None:
    crowd, expected = make_crowd(), await run_alone(mode)
    decoding = asyncio.Event()
    async with Engine(make_model(mode), make_options(mode), device=LateDevice()) as engine:
        tasks = [
            asyncio.create_task(
                engine.generate(request, lambda progress: decoding.set() if progress.fraction > 0.9 else None)
            )
            for request in crowd
        ]
        await asyncio.wait_for(decoding.wait(), PATIENCE_S)
        for task in tasks[::2]:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    kept = [(r, alone) for r, alone in zip(results, expected, strict=True) if isinstance(r, GenerationResult)]
    assert len(kept) >= len(crowd) // 2
    assert_same(mode, [result for result, _ in kept], [alone for _, alone in kept])


async def test_closing_ends_work_in_the_second_queue() -> None:
    decoding = threading.Event()
    model = ToyModel(on_call=lambda name, items: decoding.set() if name == "decode" else None)
    async with Engine(model, make_options("fast"), device=LateDevice()) as engine:
        tasks = [asyncio.create_task(engine.generate(request)) for request in make_crowd()]
        assert await asyncio.to_thread(decoding.wait, PATIENCE_S)
        await engine.close()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    assert not engine.is_alive
    ended = [result for result in results if not isinstance(result, GenerationResult)]
    assert all(isinstance(result, ModelUnavailableError) for result in ended)


_STEP_MS = 20.0


def take_ms(name: str, items: Sequence[object]) -> float:
    """Returns the simulated time of a call. Decoding a clip of 2.4 s takes as long as three steps."""
    if name == "decode":
        return 1.0 + 0.25 * sum(item.latents.shape[-1] for item in items if isinstance(item, DecodeWindow))
    return {"denoise": _STEP_MS, "encode_text": 4.0, "condition": 0.0}.get(name, 1.0)


async def test_decoding_a_long_clip_delays_a_step_by_one_turn_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "LONGEST_FRAMES", 64)
    monkeypatch.setattr(stages, "cut_windows", partial(cut_windows, longest=64))
    clock = FakeClock()
    device = TwoQueues(clock)
    names: list[str] = []

    def on_call(name: str, items: Sequence[object]) -> None:
        names.append(name)
        device.take(take_ms(name, items) / 1000.0)

    options = EngineOptions(mode="fast", torch_threads=1, fixed_share=0.001)
    requests = [make_request("short", duration_s=0.5, steps=40), make_request("long", duration_s=2.4, steps=2)]
    async with Engine(ToyModel(on_call=on_call), options, device=device, clock=clock) as engine:
        device.gate.clear()
        tasks = []
        for request in requests:
            backlog_ms = engine.backlog_ms
            tasks.append(asyncio.create_task(engine.generate(request)))
            async with asyncio.timeout(PATIENCE_S):
                while engine.backlog_ms == backlog_ms:  # noqa: ASYNC110 - another thread accepts it
                    await asyncio.sleep(0.002)
        num_before = len(device.calls)
        device.gate.set()
        results = await asyncio.gather(*tasks)
    calls = [(name, *call[1:]) for name, call in zip(names, device.calls, strict=True)][num_before:]
    decodes = [(began_at, ended_at) for name, began_at, ended_at in calls if name == "decode"]
    ends = [ended_at for name, _, ended_at in calls if name == "denoise"]
    steps_ms = [1000.0 * (later - earlier) for earlier, later in pairwise(ends)]
    longest_ms = max(1000.0 * (ended_at - began_at) for began_at, ended_at in decodes)
    assert len(decodes) >= 3
    assert longest_ms == pytest.approx(1.0 + 0.25 * 64)
    assert max(steps_ms) <= _STEP_MS + longest_ms + 0.001
    # The device is never idle and repeats no work: the total time is the sum of the work on both streams.
    total_ms = sum(take_ms(name, ()) for name, _, _ in calls if name != "decode")
    total_ms += sum(1000.0 * (ended_at - began_at) for began_at, ended_at in decodes)
    first, last = min(began_at for _, began_at, _ in calls), max(ended_at for _, _, ended_at in calls)
    assert 1000.0 * (last - first) == pytest.approx(total_ms, rel=0.02)
    assert results[1].timings.total_ms < results[0].timings.total_ms
