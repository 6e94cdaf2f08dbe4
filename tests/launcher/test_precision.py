from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stable_audio_serve.core.settings import Settings
from stable_audio_serve.launcher.precision import faster_precision
from stable_audio_serve.serving.placement import plan_deployments

ON_CPU = {"small-sfx": "cpu", "demo": "cpu"}


@pytest.fixture
def able(tmp_path: Path) -> Path:
    facts = tmp_path / "able"
    facts.write_text("flags : avx512f avx512_bf16\n")
    return facts


def hint(facts: Path, *, devices: dict[str, str | None] = ON_CPU, half: bool = True, **model: Any) -> str | None:
    models = [{"name": "small-sfx", **model}, {"name": "demo"}, {"name": "medium"}]
    plan = plan_deployments(Settings.model_validate({"models": models, "model_half": half}))
    return faster_precision(plan, devices, cpu_facts=facts)


def test_a_real_model_in_float32_on_an_able_processor_is_named_in_one_line(able: Path) -> None:
    line = hint(able)
    assert line is not None
    assert "small-sfx" in line
    assert "dtype: bfloat16" in line
    assert "demo" not in line
    assert "medium" not in line  # not loaded: nobody knows where it will run
    assert "\n" not in line


def test_nothing_is_said_where_it_would_not_help(able: Path, tmp_path: Path) -> None:
    assert hint(tmp_path / "unable") is None
    assert hint(able, devices={"small-sfx": "cuda:0", "demo": "cpu"}) is None
    assert hint(able, devices={"small-sfx": None, "demo": "cpu"}) is None


def test_nothing_is_said_to_an_operator_who_has_chosen(able: Path) -> None:
    assert hint(able, dtype="float32") is None
    assert hint(able, dtype="bfloat16") is None
    assert hint(able, half=False) is None
