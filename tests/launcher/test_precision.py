from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stable_audio_serve.core.settings import Settings
from stable_audio_serve.launcher.launch import bfloat16_hint, gpu_hint
from stable_audio_serve.serving.placement import plan_deployments

ON_CPU = {"small-sfx": "cpu", "demo": "cpu"}


@pytest.fixture
def bfloat16_cpu(tmp_path: Path) -> Path:
    facts = tmp_path / "bfloat16_cpu"
    facts.write_text("flags : avx512f avx512_bf16\n")
    return facts


def hint(facts: Path, *, devices: dict[str, str | None] = ON_CPU, half: bool = True, **model: Any) -> str | None:
    models = [{"name": "small-sfx", **model}, {"name": "demo"}, {"name": "medium"}]
    plan = plan_deployments(Settings.model_validate({"models": models, "model_half": half}))
    return bfloat16_hint(plan, devices, cpu_facts=facts)


def test_hint_names_loaded_float32_models_in_one_line(bfloat16_cpu: Path) -> None:
    line = hint(bfloat16_cpu)
    assert line is not None
    assert "small-sfx" in line
    assert "dtype: bfloat16" in line
    assert "demo" not in line
    assert "medium" not in line  # not loaded yet, so it may run on another device
    assert "\n" not in line


def test_no_hint_where_bfloat16_would_not_help(bfloat16_cpu: Path, tmp_path: Path) -> None:
    assert hint(tmp_path / "unable") is None
    assert hint(bfloat16_cpu, devices={"small-sfx": "cuda:0", "demo": "cpu"}) is None
    assert hint(bfloat16_cpu, devices={"small-sfx": None, "demo": "cpu"}) is None


def test_no_hint_when_the_operator_chose_a_precision(bfloat16_cpu: Path) -> None:
    assert hint(bfloat16_cpu, dtype="float32") is None
    assert hint(bfloat16_cpu, dtype="bfloat16") is None
    assert hint(bfloat16_cpu, half=False) is None


def test_models_with_a_gpu_that_torch_cannot_use_are_named() -> None:
    models = [{"name": "small-sfx"}, {"name": "medium"}, {"name": "demo", "device": "cpu"}]
    plan = plan_deployments(Settings.model_validate({"models": models}))
    line = gpu_hint(plan, {**ON_CPU, "medium": "cuda:0"}, num_gpus=1)
    assert line is not None
    assert "cannot use this machine's GPU, so small-sfx runs on the CPU" in line
    assert gpu_hint(plan, ON_CPU, num_gpus=0) is None
