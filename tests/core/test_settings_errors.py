"""An error about a setting has the setting's path or environment variable, and the allowed values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stable_audio_serve.core.errors import ConfigError
from stable_audio_serve.core.settings import IngressSettings, Settings
from stable_audio_serve.core.settings_sources import VARIABLES, load_settings


def complaint(folder: Path, args: dict[str, Any] | None = None, **environ: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_settings(args, environ=environ, directory=folder)
    return caught.value.message


@pytest.mark.parametrize(
    ("args", "error"),
    [
        ({"modles": []}, "modles: unknown; did you mean models?"),
        ({"models": [{"name": "a", "num_gpu": 1}]}, "models.0.num_gpu: unknown; did you mean num_gpus?"),
        (
            {"models": [{"name": "a"}, {"name": "b", "replicas": {"max-replica": 2}}]},
            "models.1.replicas.max-replica: unknown; did you mean max_replicas?",
        ),
        (
            {"models": [{"name": "a", "loras": {"path": "x", "vinyl": {"path": "y", "conditoner": True}}}]},
            "models.0.loras.vinyl.conditoner: unknown; did you mean conditioner?",
        ),
        ({"api": {"MAX_STEPS": 9}}, "api.MAX_STEPS: unknown; did you mean max_steps?"),
        ({"ingress": {"colour": "red"}}, f"ingress.colour: unknown; valid: {', '.join(IngressSettings.model_fields)}"),
        ({"max_steps": 9}, f"max_steps: unknown; valid: {', '.join(Settings.model_fields)}"),
        (
            {"models": [{"name": "a", "num_gpu": 1}], "ingress": {"replicas": 0}},
            "ingress.replicas: Input should be greater than or equal to 1 (got 0); "
            "models.0.num_gpu: unknown; did you mean num_gpus?",
        ),
    ],
)
def test_an_unknown_key_names_the_nearest_one(tmp_path: Path, args: dict[str, Any], error: str) -> None:
    assert complaint(tmp_path, args) == error


@pytest.mark.parametrize(
    ("args", "error"),
    [
        ({"api": {"max_steps": 5000}}, "api.max_steps: Input should be less than or equal to 1000 (got 5000)"),
        ({"api": {"max_duration_s": 0}}, "api.max_duration_s: Input should be greater than 0 (got 0)"),
        ({"log_level": "loud"}, "log_level: Input should be 'debug', 'info', 'warning' or 'error' (got 'loud')"),
        ({"device": "gpu"}, "device: must be cuda, cuda:N, mps or cpu (got 'gpu')"),
        ({"default_model": ""}, "default_model: String should have at least 1 character (got '')"),
        (
            {"api": {"public_url": "ftp:x"}},
            "api.public_url: must be an http:// or https:// URL without query (got 'ftp:x')",
        ),
        ({"models": []}, "models: Tuple should have at least 1 item after validation, not 0 (got [])"),
        ({"models": ["x"]}, "models.0: Input should be a valid dictionary or instance of ModelSettings (got 'x')"),
        (
            {"models": [{"name": "a", "replicas": {"min_replicas": 3}}]},
            "models.0.replicas: min_replicas must not be above max_replicas",
        ),
        ({"models": [{"path": "x"}]}, "models.0.name: Field required"),
        (
            {"dialects": {"fal_models": {"stable-audio-3/large": "x"}}},
            "dialects.fal_models.stable-audio-3/large.[key]: Input should be 'stable-audio-3/medium', "
            "'stable-audio-3/medium/base', 'stable-audio-3/small/music', 'stable-audio-3/small/music/base', "
            "'stable-audio-3/small/sfx' or 'stable-audio-3/small/sfx/base' (got 'stable-audio-3/large')",
        ),
        (
            {"ingress": {"replicas": 0}, "jobs": {"runners": "two"}},
            "ingress.replicas: Input should be greater than or equal to 1 (got 0); "
            "jobs.runners: Input should be a valid integer, unable to parse string as an integer (got 'two')",
        ),
    ],
)
def test_a_value_out_of_range_names_the_range(tmp_path: Path, args: dict[str, Any], error: str) -> None:
    assert complaint(tmp_path, args) == error


def test_a_bad_value_of_a_variable_names_the_variable(tmp_path: Path) -> None:
    error = complaint(tmp_path, STABLE_AUDIO_MAX_STEPS="8.5")
    assert error.startswith("STABLE_AUDIO_MAX_STEPS: Input should be a valid integer")
    assert error.endswith("(got '8.5')")
    assert complaint(tmp_path, STABLE_AUDIO_MAX_STEPS="0") == (
        "STABLE_AUDIO_MAX_STEPS: Input should be greater than or equal to 1 (got '0')"
    )
    assert complaint(tmp_path, {"api": {"max_steps": 3}}, STABLE_AUDIO_MAX_STEPS="1001").startswith("STABLE_AUDIO_MAX")


@pytest.mark.parametrize(
    "storage",
    [{"secret_access_key": ["hush"]}, ["hush"], {"endpoint_url": "https://me:hush@s3.example"}],
)
def test_possibly_secret_values_are_not_shown(tmp_path: Path, storage: object) -> None:
    error = complaint(tmp_path, {"storage": storage})
    assert "storage" in error
    assert "hush" not in error


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("STABLE_AUDIO_DEFUALT_MODEL", "STABLE_AUDIO_DEFUALT_MODEL: unknown; did you mean STABLE_AUDIO_DEFAULT_MODEL?"),
        ("STABLE_AUDIO_MAX_STEP", "STABLE_AUDIO_MAX_STEP: unknown; did you mean STABLE_AUDIO_MAX_STEPS?"),
        ("STABLE_AUDIO_QQQQ", "STABLE_AUDIO_QQQQ: unknown variable"),
    ],
)
def test_an_unknown_variable_with_our_prefix_is_refused(tmp_path: Path, name: str, error: str) -> None:
    assert complaint(tmp_path, **{name: "x"}) == error
    (tmp_path / ".env").write_text(f"{name}=x\n")
    assert complaint(tmp_path) == error


def test_env_file_in_another_encoding_is_named(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("OTHER=1\n", encoding="utf-16")
    assert complaint(tmp_path) == f"{tmp_path}/.env: it is not UTF-8 text"


def test_kubernetes_service_variables_are_ignored(tmp_path: Path) -> None:
    given = {
        "STABLE_AUDIO_SERVICE_HOST": "10.0.0.1",
        "STABLE_AUDIO_SERVICE_PORT": "8000",
        "STABLE_AUDIO_SERVICE_PORT_HTTP": "8000",
        "STABLE_AUDIO_PORT": "tcp://10.0.0.1:8000",
        "STABLE_AUDIO_PORT_8000_TCP": "tcp://10.0.0.1:8000",
        "STABLE_AUDIO_PORT_8000_TCP_ADDR": "10.0.0.1",
        "STABLE_AUDIO_SERVE_SERVICE_HOST": "10.0.0.1",
    }
    load_settings(environ=dict(given), directory=tmp_path)
    error = complaint(tmp_path, **given | {"STABLE_AUDIO_PORT": "8000"})
    assert error.startswith("STABLE_AUDIO_PORT: unknown")


def test_misspelt_variables_name_the_nearest_one(tmp_path: Path) -> None:
    for name in (name for names in VARIABLES.values() for name in names if name.startswith("STABLE_AUDIO_")):
        error = complaint(tmp_path, **{name[:-2] + name[-1]: "1"})
        assert f"did you mean {name}?" in error


def test_errors_show_no_regular_expression() -> None:
    schema = json.dumps(Settings.model_json_schema())
    assert '"maxLength"' in schema
    assert '"pattern"' not in schema
