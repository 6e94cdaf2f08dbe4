"""An engine checks the device's speed features when it starts, so devices with wrong features give the right audio."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stable_audio_serve.core.generation import GenerationRequest, GenerationResult, Loaded
from stable_audio_serve.engine import Engine, EngineOptions
from stable_audio_serve.engine.hardware.device import Device
from stable_audio_serve.engine.options import PLAIN, Features
from stable_audio_serve.engine.profile import prove
from stable_audio_serve.models import native
from stable_audio_serve.models.families import load_model
from stable_audio_serve.models.registry import resolve_entry
from tests.engine.capturing import GraphCounts, RecordingDevice
from tests.factories import make_request
from tests.goldens import load_goldens
from tests.models.loaded import loaded
from tests.patience import until

REQUEST = make_request("rain", duration_s=0.4, seed=3, steps=4)


class GpuLike(RecordingDevice):
    """A CPU device whose features the engine must check before use. Subclasses have a wrong feature."""

    def __init__(self, features: Features = Features()) -> None:
        super().__init__()
        self.is_proved = False
        self.can_capture, self.has_second_queue = features.captures, features.second_queue

    def restricted(self, features: Features) -> Device:
        return type(self)(features)


class WrongSecondQueue(GpuLike):
    """If the second queue is used, copies to the host are wrong, as if begun before the queue's work was finished."""

    def download(self, source: Tensor, target: Tensor) -> None:
        super().download(source * 1.001 if self.has_second_queue else source, target)


class FailingCapture(GpuLike):
    """The fifth capture fails."""

    num_captures = 0

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        self.num_captures += 1
        if self.num_captures == 5:
            raise torch.AcceleratorError("this call cannot be captured")
        return super().capture(run)


class LostWithCaptures(GpuLike):
    """Every capture fails, and the device is lost after a failed capture."""

    survives_failed_capture = False

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("capture failed")


async def serve(device: Device, **fields: Any) -> tuple[Engine, np.ndarray]:
    options = EngineOptions(warmup_budget_s=0.0, torch_threads=1, mode="strict", **fields)
    async with Engine(loaded("sharp-s"), options, device=device, metrics=GraphCounts()) as engine:
        return engine, (await engine.generate(REQUEST)).audio[0]


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    return asyncio.run(serve(RecordingDevice()))[1]


async def test_features_that_agree_with_the_plain_path_are_used(expected: np.ndarray) -> None:
    engine, audio = await serve(GpuLike())
    assert (engine.profile.name, engine.profile.features) == ("accelerated", Features())
    np.testing.assert_array_equal(audio, expected)


async def test_a_late_copy_means_the_plain_profile_by_name(expected: np.ndarray, caplog: Any) -> None:
    engine, audio = await serve(WrongSecondQueue())
    assert engine.profile.features == PLAIN
    assert "differs from the plain path by -60.0 dB (allowed: no difference)" in engine.profile.reason
    assert engine.profile.reason.partition(": ")[2] in caplog.text
    np.testing.assert_array_equal(audio, expected)


async def test_features_that_are_off_are_named_with_the_profile() -> None:
    class FullDevice(GpuLike):
        def capture(self, run: Callable[[], None]) -> Callable[[], None]:
            raise RuntimeError("no room")

    options = EngineOptions(mode="fast", profile="accelerated", warmup_budget_s=0.0, torch_threads=1)
    async with Engine(loaded("sharp-s"), options, device=FullDevice()) as engine:
        assert engine.describe_profile() == (
            "accelerated; packing off: this torch or precision has no attention for packed rows; "
            "fused_kernels off: Triton's kernels do not work here, or the model is compiled"
        )
        for _ in range(3):
            await engine.generate(REQUEST)
        await until(lambda: "captures off" in engine.describe_profile())
        assert "no room" in engine.describe_profile()


async def test_the_plain_profile_loads_no_fused_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine where a kernel ends the process, the plain profile must work."""
    used: list[object] = []
    monkeypatch.setattr(native, "load_kernels", lambda *device_and_dtype: used.append(device_and_dtype))
    model = load_model(resolve_entry("own", path=str(load_goldens("sharp-s").folder)))
    for profile in ("plain", "accelerated"):
        assert not used
        options = EngineOptions(profile=profile, warmup_budget_s=0.0, torch_threads=1)  # type: ignore[arg-type]
        async with Engine(model, options, device=GpuLike()):
            pass
    assert used


@pytest.mark.parametrize("make", [FailingCapture, LostWithCaptures])
async def test_a_failing_capture_changes_no_audio(make: Callable[[], Device], expected: np.ndarray) -> None:
    _, audio = await serve(make())
    np.testing.assert_array_equal(audio, expected)


async def test_the_plain_profile_names_its_weights_and_precision() -> None:
    options = EngineOptions(warmup_budget_s=0.0, torch_threads=1, mode="strict")
    half = Loaded(decode_precision="half")
    engine = Engine(loaded("sharp-s"), options, device=WrongSecondQueue(), loaded=half)
    engine.name_checkpoint("ab12")  # before the engine starts, as outside Ray
    async with engine:
        provenance = (await engine.generate(REQUEST)).provenance
    assert engine.profile.name == "plain"
    assert provenance is not None
    assert provenance.loaded == Loaded("ab12", decode_precision="float32")


async def test_the_operator_may_choose_the_profile(expected: np.ndarray) -> None:
    engine, audio = await serve(WrongSecondQueue(), profile="plain")
    assert (engine.profile.name, engine.profile.reason) == ("plain", "engine.profile is plain")
    np.testing.assert_array_equal(audio, expected)
    engine, _ = await serve(WrongSecondQueue(), features=Features(second_queue=False))
    assert engine.profile.features == Features(second_queue=False)
    engine, audio = await serve(WrongSecondQueue(), profile="accelerated")  # unchecked
    assert not np.array_equal(audio, expected)


class Rounding:
    """An engine whose audio, with packed rows, differs by 41 dB, as float16 does if the order of a sum changes."""

    def __init__(self, features: Features) -> None:
        self._level = 10 ** (-41 / 20) * features.packing

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    async def generate(self, request: GenerationRequest) -> GenerationResult:
        noise, error = np.random.default_rng(request.seed).standard_normal((2, 1, 1000)).astype(np.float32)
        return GenerationResult((noise + self._level * error,), 44100, "toy", (request.seed,))


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.float32, "plain"), (torch.float16, "accelerated"), (torch.bfloat16, "accelerated")]
)
async def test_the_check_allows_the_rounding_of_the_precision(dtype: torch.dtype, name: str) -> None:
    spec = replace(loaded("tiny-s").spec, dtype=dtype)
    profile = await prove(lambda features, _: Rounding(features), Features(), spec=spec, mode="fast")
    assert profile.name == name
