"""With the packaged adapter, the demo model plays tones an octave lower; without it, at the pitch of the prompt."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from examples.demo_model.clips import ClipConfig
from examples.demo_model.scenes import Scene
from examples.demo_model.train_adapter import (
    AdapterTrainingConfig,
    evaluate,
    lower_octave,
    tone_cases,
    train_adapter,
    write_adapter,
)
from stable_audio_serve.models.adapters.adapter import read_adapter
from stable_audio_serve.models.registry import DEMO_ADAPTERS
from tests.parameters import slow

PATH = DEMO_ADAPTERS["octave-down"]


def test_the_adapter_is_small_and_is_read_without_warnings() -> None:
    assert PATH.stat().st_size < 300_000
    adapter = read_adapter(PATH)
    assert (adapter.name, adapter.type, adapter.rank) == ("octave-down", "lora", 16)
    assert not adapter.warnings


@pytest.mark.parametrize(("count", "least"), [(1, 1), slow(20, 18)])
async def test_tones_are_an_octave_lower_only_with_the_adapter(count: int, least: int) -> None:
    lower, unchanged = await evaluate(PATH, tone_cases(count, seed=1))
    assert lower >= least
    assert unchanged == count


def test_only_pitched_sounds_are_lowered_and_not_below_the_lowest() -> None:
    assert lower_octave(Scene("tone", voice="sine", pitch=82)).pitch == 58
    assert lower_octave(Scene("tone", voice="bass", pitch=24)).pitch == 16
    sweep = lower_octave(Scene("sweep", voice="sine", pitch=55, target=135))
    assert (sweep.pitch, sweep.target) == (31, 111)
    beat = Scene("beat", voice="kick")
    assert lower_octave(beat) == beat
    assert lower_octave(Scene("chord", pitch=64, under=beat)).under == beat


def test_a_trained_adapter_is_written_in_the_format_of_the_trainers(tmp_path: Path) -> None:
    config = AdapterTrainingConfig(steps=2, rank=4, clips=ClipConfig(batch_latents=40, longest_s=0.6))
    trained = train_adapter(config)
    write_adapter(trained, tmp_path / "short.safetensors", rank=config.rank)
    adapter = read_adapter(tmp_path / "short.safetensors")
    assert adapter.layers.keys() == {f"model.{layer}" for layer in trained}
    for layer, part in trained.items():
        torch.testing.assert_close(adapter.layers[f"model.{layer}"]["lora_B"].float(), part.b, atol=1e-4, rtol=1e-3)
        assert part.b.abs().max() > 0
