"""The setting `memory_share`: a model's share of a GPU's memory. An engine on a fake device keeps to its share."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from stable_audio_serve.core.clock import Clock
from stable_audio_serve.core.errors import ConfigError
from stable_audio_serve.core.settings import ModelSettings, Settings
from stable_audio_serve.engine.hardware.share import CONTEXT_BYTES
from stable_audio_serve.serving.engines import load_engine, memory_share
from tests.engine.test_share import SharedDevice
from tests.factories import make_request
from tests.goldens import SA3_GOLDENS

TINY = str(SA3_GOLDENS / "tiny-s")


def open_shared(device: torch.device, *, clock: Clock, share: float, total: int) -> SharedDevice:
    assert device.type == "cpu"
    return SharedDevice(total, share=share)


def load(total: int, *, gpu_share: float = 0.25, **keys: object) -> object:
    model = ModelSettings.model_validate({"name": "tiny", "path": TINY, "engine": {"warmup_budget_s": 0}, **keys})
    settings = Settings(models=(model,))
    return load_engine(settings, model, gpu_share=gpu_share, open_device=partial(open_shared, total=total))


def test_memory_share_defaults_to_the_share_of_the_gpu() -> None:
    assert memory_share(ModelSettings(name="demo"), gpu_share=0.25) == 0.25
    assert memory_share(ModelSettings(name="demo", memory_share=0.4), gpu_share=0.25) == 0.4
    assert memory_share(ModelSettings(name="demo"), gpu_share=1.0) == 1.0
    assert memory_share(ModelSettings(name="demo"), gpu_share=0.0) == 1.0  # a model on a CPU


@pytest.mark.slow
async def test_loaded_model_stays_within_its_share() -> None:
    total = 40 * 10**9
    engine = load(total)
    allowed, caches = total / 4 - CONTEXT_BYTES, 2**28 + 2**29  # prompts and adapters
    assert engine.memory.rows == pytest.approx(0.85 * (0.95 * allowed - caches), rel=1e-6)  # type: ignore[attr-defined]
    async with engine:  # type: ignore[attr-defined]
        result = await engine.generate(make_request(duration_s=0.5))  # type: ignore[attr-defined]
    assert result.made_on.device == "cpu"


def test_weights_too_large_for_the_share_are_refused_unloaded() -> None:
    with pytest.raises(
        ConfigError, match=r"models\.tiny: memory_share 0\.25 of the GPU's .* it needs .* at least 0\.5\d"
    ):
        load(2 * CONTEXT_BYTES - 10**6)


def test_larger_share_holds_the_weights() -> None:
    assert load(2 * CONTEXT_BYTES + 2**29, memory_share=0.9)
