"""A model's `engine:` settings reach its engine. Errors name invalid settings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.overrides import TorchFunctionMode

from stable_audio_serve.core.errors import ConfigError
from stable_audio_serve.core.settings import EngineSettings, Settings
from stable_audio_serve.core.settings_sources import load_settings
from stable_audio_serve.engine import EngineOptions
from stable_audio_serve.engine.options import Features
from stable_audio_serve.models.families import resolve_device
from stable_audio_serve.serving.engines import engine_options, fetch_files, first_device, speed_hint
from stable_audio_serve.serving.serve_file import read_serve_file
from tests.goldens import SA3_GOLDENS
from tests.models.hub import Repo, checkpoint_files, pointing_library_at, running_hub

# Every key of `engine:` -> a valid value that is not the default, and values that are out of range.
ENGINE_KEYS: dict[str, tuple[object, tuple[object, ...]]] = {
    "profile": ("plain", ("fast", None)),
    "warmup_budget_s": (0.0, (-1, float("nan"))),
}


def settings_of(folder: Path, model: dict[str, Any]) -> Settings:
    """Write a configuration file with one model, which has these additional keys. Return the parsed settings."""
    application = {
        "import_path": "stable_audio_serve.serving.app:build",
        "args": {"models": [{"name": "demo", **model}]},
    }
    path = folder / "serve_config.yaml"
    path.write_text(yaml.safe_dump({"applications": [application]}))
    return load_settings(read_serve_file(path).args, environ={}, directory=folder)


def options_of(folder: Path, model: dict[str, Any]) -> EngineOptions:
    (parsed,) = settings_of(folder, model).models
    return engine_options(parsed, threads=1)


def test_every_engine_key_is_tested() -> None:
    assert ENGINE_KEYS.keys() | {"features"} == EngineSettings.model_fields.keys()


def test_features_are_switched_off_by_name(tmp_path: Path) -> None:
    assert options_of(tmp_path, {}).features == Features()
    switched_off = options_of(tmp_path, {"engine": {"features": {"captures": False, "packing": False}}})
    assert switched_off.features == Features(captures=False, packing=False)
    with pytest.raises(ConfigError, match=r"models\.0\.engine\.features\.speed"):
        options_of(tmp_path, {"engine": {"features": {"speed": False}}})


@pytest.mark.parametrize("knob", ENGINE_KEYS)
def test_engine_key_changes_only_its_option(tmp_path: Path, knob: str) -> None:
    value = ENGINE_KEYS[knob][0]
    usual, set_ = options_of(tmp_path, {}), options_of(tmp_path, {"engine": {knob: value}})
    changed = {field.name for field in fields(EngineOptions) if getattr(usual, field.name) != getattr(set_, field.name)}
    assert changed == {knob}
    assert getattr(set_, knob) == value


@pytest.mark.parametrize(
    ("key", "value"), [("mode", "fast"), ("max_queue_s", 7.0), ("max_memory_bytes", 5_000_000_000)]
)
def test_model_keys_reach_the_engine(tmp_path: Path, key: str, value: object) -> None:
    assert getattr(options_of(tmp_path, {key: value}), key) == value


def test_defaults_are_those_of_the_engine() -> None:
    settings, options = EngineSettings(), EngineOptions()
    assert {name: getattr(options, name) for name in ENGINE_KEYS} == settings.model_dump(exclude={"features"})


@pytest.mark.parametrize(("knob", "value"), [(knob, value) for knob, (_, bad) in ENGINE_KEYS.items() for value in bad])
def test_value_out_of_range_is_refused_by_name(tmp_path: Path, knob: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"models\.0\.engine\.{knob}: Input should be "):
        settings_of(tmp_path, {"engine": {knob: value}})


def test_mistyped_key_is_named_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"models\.0\.engine\.feature: unknown; did you mean features\?"):
        settings_of(tmp_path, {"engine": {"feature": {}}})
    with pytest.raises(ConfigError, match=r"models\.0\.warmup_budget_s: unknown; valid: name, .*, engine"):
        settings_of(tmp_path, {"warmup_budget_s": 4})


def fetch(repo: Repo, cache: Path, *, pauses_s: Iterator[float]) -> list[str]:
    """Fetch the files of a model from a hub with this repository. Return the names of the downloaded files."""
    settings = Settings.model_validate({"models": [{"name": "mine", "repo_id": "lab/model"}]})
    with running_hub({"lab/model": repo}) as hub, pointing_library_at(hub.url, cache):
        fetch_files(settings, settings.models[0], pauses_s=pauses_s)
        return hub.fetched


def test_a_hub_that_does_not_answer_is_asked_again(tmp_path: Path) -> None:
    repo = Repo(checkpoint_files(SA3_GOLDENS / "tiny-s"), status=503)

    def pauses_s() -> Iterator[float]:
        yield 0.0
        repo.status = None  # before the second attempt
        yield 0.0

    assert "model.safetensors" in fetch(repo, tmp_path, pauses_s=pauses_s())


def test_a_hub_that_refuses_access_is_asked_once(tmp_path: Path) -> None:
    repo = Repo(checkpoint_files(SA3_GOLDENS / "tiny-s"), gated=True, token="good")
    assert fetch(repo, tmp_path, pauses_s=iter([3600.0])) == []  # without a pause, and loading raises the error


@pytest.fixture
def bfloat16_cpu(tmp_path: Path) -> Path:
    facts = tmp_path / "bfloat16_cpu"
    facts.write_text("flags : avx512f avx512_bf16\n")
    return facts


def hint(facts: Path, *, device: str = "cpu", gpu_share: float = 0.0, half: bool = True, **model: Any) -> str | None:
    settings = Settings.model_validate({"models": [{"name": "small-sfx", **model}], "model_half": half})
    return speed_hint(settings, settings.models[0], device=torch.device(device), gpu_share=gpu_share, cpu_facts=facts)


def test_float32_model_on_a_bfloat16_cpu_gets_a_hint_of_one_line(bfloat16_cpu: Path) -> None:
    line = hint(bfloat16_cpu)
    assert line is not None
    assert "float32 is used for small-sfx" in line
    assert "dtype: bfloat16" in line
    assert "\n" not in line


def test_no_hint_where_bfloat16_would_not_help(bfloat16_cpu: Path, tmp_path: Path) -> None:
    assert hint(tmp_path / "unable") is None
    assert hint(bfloat16_cpu, device="cuda:0", gpu_share=1.0) is None
    assert hint(bfloat16_cpu, name="demo") is None


def test_no_hint_when_the_operator_chose_a_precision(bfloat16_cpu: Path) -> None:
    assert hint(bfloat16_cpu, dtype="float32") is None
    assert hint(bfloat16_cpu, dtype="bfloat16") is None
    assert hint(bfloat16_cpu, half=False) is None


def test_model_with_a_gpu_that_torch_cannot_use_is_named(bfloat16_cpu: Path) -> None:
    line = hint(bfloat16_cpu, gpu_share=0.5, dtype="float32")
    assert line is not None
    assert "cannot use this machine's GPU, so small-sfx runs on the CPU" in line


class FailingGpu(TorchFunctionMode):
    """A GPU whose memory can be allocated, but on which every kernel fails with this error: at its launch, or only when
    the process waits for it.
    """

    def __init__(self, error: str, *, is_late: bool) -> None:
        super().__init__()
        self._error = error
        self._working = {"empty", "__get__", "ones"} if is_late else {"empty", "__get__"}

    def __torch_function__(  # torch's signature
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func.__name__ in self._working:
            return func(*args, **{**kwargs, "device": "cpu"})
        raise torch.AcceleratorError(self._error)


@pytest.mark.parametrize(
    ("error", "is_late", "device"),
    [
        ("CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors", False, "cpu"),
        ("HIP error: invalid device function\nHIP kernel errors", False, "cpu"),
        ("CUDA error: CUDA-capable device(s) is/are busy or unavailable", False, "cuda"),
        ("CUDA error: uncorrectable ECC error encountered", True, "cuda"),
    ],
    ids=["cuda", "rocm", "busy", "late"],
)
def test_only_a_gpu_for_which_torch_has_no_code_is_left_out(
    monkeypatch: pytest.MonkeyPatch, *, error: str, is_late: bool, device: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with FailingGpu(error, is_late=is_late):
        assert first_device() == device
        with pytest.raises(ConfigError) as raised:
            resolve_device("cuda")
    assert raised.value.message == f"device 'cuda' cannot be used here: {error.splitlines()[0]}"
