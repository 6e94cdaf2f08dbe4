"""Engine calls as CUDA graphs: a replay with new inputs equals an eager call, and a wrong graph changes no audio."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from stable_audio_serve.core.clock import SystemClock
from stable_audio_serve.core.generation import Mode
from stable_audio_serve.engine import Engine, EngineOptions
from stable_audio_serve.engine.calls.coding_calls import DecodeCalls
from stable_audio_serve.engine.hardware.graphs import Graphs
from stable_audio_serve.models.families import load_model
from stable_audio_serve.models.protocol import DecodeWindow, DiffusionModel
from stable_audio_serve.models.registry import resolve_entry
from stable_audio_serve.sampling.noise import SeededNoise
from tests.engine.capturing import MOST_ROUNDS, GraphCounts, LateRecordingDevice, RecordedDevice, RecordingDevice
from tests.factories import make_audio, make_request
from tests.goldens import load_open_goldens
from tests.models.loaded import loaded
from tests.parameters import slow

FRAMES = 32


@cache
def load(name: str) -> Any:
    if name.startswith("sharp"):
        return loaded(name)
    return load_model(resolve_entry(name, path=str(load_open_goldens(name).folder)))


@pytest.fixture(params=["sharp-s", slow("sharp-l"), slow("tiny-1.0")])
def model(request: pytest.FixtureRequest) -> Any:
    return load(request.param)


def windows_of(model: DiffusionModel, *seeds: int) -> list[DecodeWindow]:
    shape = (model.spec.card.latent_channels, FRAMES)
    drawn = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return [DecodeWindow(x, 8 * seed, SeededNoise(seed)) for seed, x in zip(seeds, drawn, strict=True)]


def addresses(graphs: Graphs) -> list[int]:
    memory = [(captured.memory.inputs, captured.memory.outputs) for captured in graphs._captured.values()]
    return [tensor.data_ptr() for pair in memory for tensor in pair]


def same(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.server
def test_replayed_decode_call_is_bit_identical_for_other_latents(model: Any) -> None:
    device = RecordedDevice()
    graphs = Graphs(device, clock=SystemClock(), metrics=GraphCounts())
    calls = DecodeCalls(model, device=device, graphs=graphs)
    with torch.inference_mode():
        for _ in range(3):  # the first call of a new length only finds out which noise the decoder draws
            expected = calls.decode(windows_of(model, 1, 2, 3))
        assert graphs.capture_next(is_idle=True)
        before = addresses(graphs)
        again = calls.decode(windows_of(model, 1, 2, 3))
        others, wanted = calls.decode(windows_of(model, 4, 5, 6)), model.decode(windows_of(model, 4, 5, 6))
    assert device.num_replays == 2
    assert addresses(graphs) == before
    assert same(again, expected)
    assert same(others, wanted)


@pytest.mark.slow
def test_unused_places_of_a_replayed_call_do_not_matter() -> None:
    model, device = load("sharp-s"), RecordedDevice()
    graphs = Graphs(device, clock=SystemClock(), metrics=GraphCounts())
    decoder = DecodeCalls(model, device=device, graphs=graphs)
    with torch.inference_mode():
        for _ in range(3):
            decoder.decode(windows_of(model, 1, 2, 3, 4, 5, 6))
        while graphs.capture_next(is_idle=True):
            pass
        decoder.decode(windows_of(model, 1, 2, 3, 4, 5, 6))  # the first replay is compared with an eager call
        audio = decoder.decode(windows_of(model, 7, 8, 9, 10, 11))
        wanted = model.decode(windows_of(model, 7, 8, 9, 10, 11))
    assert device.num_replays == 2
    for found, right in zip(audio, wanted, strict=True):
        torch.testing.assert_close(found, right, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("name", "make_device"),
    [slow("sharp-s", RecordingDevice), slow("tiny-1.0", RecordingDevice), ("sharp-s", LateRecordingDevice)],
)
async def test_captured_calls_change_no_byte(
    name: str, make_device: type[RecordingDevice | LateRecordingDevice]
) -> None:
    model = load(name)
    options = EngineOptions(mode="strict", warmup_budget_s=0.0, torch_threads=1, prompt_cache_bytes=0)
    requests = [
        make_request(prompt, duration_s=0.4, seed=seed, steps=2, sampler=None, **fields)
        for seed, (prompt, fields) in enumerate(
            [
                ("rain", {}),
                ("a dog", {"cfg_scale": 3.0, "negative_prompt": "hiss"}),
                ("wind", {"init_audio": make_audio(0.4, sample_rate_hz=44_100), "init_noise_level": 0.5}),
            ]
        )
    ]
    async with Engine(model, options) as engine:
        expected = [await engine.generate(request) for request in requests]
    device, metrics = make_device(), GraphCounts()
    async with Engine(model, options, device=device, metrics=metrics) as engine:
        for _ in range(MOST_ROUNDS):
            await asyncio.gather(*map(engine.generate, requests))
            if await metrics.are_captured("denoise", "decode"):
                break
        else:
            raise AssertionError(f"only some calls were captured: {metrics.graphs}")
        results = [await engine.generate(request) for request in requests]
    assert device.num_replays > 0
    for result, alone in zip(results, expected, strict=True):
        np.testing.assert_array_equal(result.audio[0], alone.audio[0])


class LyingDevice(RecordingDevice):
    """In every replay, the torch operation `is_wrong_in` writes one wrong element."""

    def __init__(self, *, is_wrong_in: str) -> None:
        super().__init__()
        self.is_wrong_in = is_wrong_in

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        run()

        def replay() -> None:
            self.num_replays += 1
            with _Spoiling(self.is_wrong_in):
                run()

        return replay


class _Spoiling(TorchFunctionMode):
    """Changes one element of the values that the operation `name` writes to the engine's memory."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def __torch_function__(  # torch's signature
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name == self._name == "index_copy_":
            args[3][(0,) * args[3].dim()] += 0.5
        result = func(*args, **(kwargs or {}))
        if name == self._name == "stack" and "out" in (kwargs or {}):
            result[(0,) * result.dim()] += 0.5
        return result


@pytest.mark.parametrize("operation", ["index_copy_", "stack"])  # they end a step and a decoder call
@pytest.mark.parametrize("mode", ["strict", slow("fast")])
async def test_a_wrong_capture_changes_no_audio(mode: Mode, operation: str) -> None:
    model, metrics = load("sharp-s"), GraphCounts()
    options = EngineOptions(mode=mode, frame_grid=64, warmup_budget_s=0.0, torch_threads=1)
    request = make_request("rain", duration_s=0.4, seed=3, steps=4)
    async with Engine(model, options, device=RecordingDevice()) as engine:
        expected = (await engine.generate(request)).audio[0]
    device = LyingDevice(is_wrong_in=operation)
    async with Engine(model, options, device=device, metrics=metrics) as engine:
        for _ in range(MOST_ROUNDS):
            np.testing.assert_array_equal((await engine.generate(request)).audio[0], expected)
            await metrics.are_captured("denoise", "decode")
            if metrics.num_off:
                break
        assert metrics.num_off == 1
        assert not any(metrics.graphs.values())
        np.testing.assert_array_equal((await engine.generate(request)).audio[0], expected)
    assert device.num_replays > 0
