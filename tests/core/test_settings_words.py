"""What is said of a setting that cannot be used: in our words, whole sentences as an operator reads them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stable_audio_serve.core.errors import ConfigError
from stable_audio_serve.core.settings import Settings
from stable_audio_serve.core.settings_sources import VARIABLES, load_settings


def complaint(folder: Path, args: dict[str, Any] | None = None, **environ: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_settings(args, environ=environ, directory=folder)
    return caught.value.message


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"modles": []}, "modles: unknown; did you mean models?"),
        ({"models": [{"name": "a", "num_gpu": 1}]}, "models.0.num_gpu: unknown; did you mean num_gpus?"),
        (
            {"models": [{"name": "a"}, {"name": "b", "replicas": {"max-replica": 2}}]},
            "models.1.replicas.max-replica: unknown; did you mean max_replicas?",
        ),
        ({"api": {"MAX_STEPS": 9}}, "api.MAX_STEPS: unknown; did you mean max_steps?"),
        ({"max_steps": 9}, "max_steps: unknown; did you mean api.max_steps?"),
        ({"num_gpus": 1}, "num_gpus: unknown; did you mean models.0.num_gpus?"),
        (
            {"ingress": {"colour": "red"}},
            "ingress.colour: unknown; valid here: max_event_streams, max_event_streams_per_client, "
            "max_ongoing_requests, num_cpus, replicas",
        ),
    ],
)
def test_an_unknown_key_is_told_the_nearest_one(tmp_path: Path, args: dict[str, Any], said: str) -> None:
    assert complaint(tmp_path, args) == said


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"api": {"max_steps": 5000}}, "api.max_steps: must be a whole number from 1 to 1000 (got 5000)"),
        ({"api": {"max_duration_s": "long"}}, "api.max_duration_s: must be a number above 0 (got 'long')"),
        ({"ingress": {"replicas": 0}}, "ingress.replicas: must be a whole number of at least 1 (got 0)"),
        ({"model_half": "maybe"}, "model_half: must be true or false (got 'maybe')"),
        ({"log_level": "loud"}, "log_level: must be one of debug, info, warning, error (got 'loud')"),
        ({"device": "gpu"}, "device: must be cuda, cuda:N, mps or cpu (got 'gpu')"),
        ({"default_model": ""}, "default_model: must be text of 1 to 200 characters (got '')"),
        (
            {"api": {"public_url": "ftp:x"}},
            "api.public_url: must be an http:// or https:// URL without query (got 'ftp:x')",
        ),
        ({"models": []}, "models: must be a list of at least 1 (got [])"),
        ({"models": ["demo"]}, "models.0: must be a mapping (got 'demo')"),
        ({"ingress": 7}, "ingress: must be a mapping (got 7)"),
        (
            {"models": [{"name": "a", "replicas": {"min_replicas": 3}}]},
            "models.0.replicas: min_replicas must not be above max_replicas",
        ),
        (
            {"ingress": {"replicas": 0}, "jobs": {"runners": "two"}},
            "ingress.replicas: must be a whole number of at least 1 (got 0); "
            "jobs.runners: must be a whole number of at least 1 (got 'two')",
        ),
    ],
)
def test_a_value_out_of_range_is_told_the_range(tmp_path: Path, args: dict[str, Any], said: str) -> None:
    assert complaint(tmp_path, args) == said


def test_a_required_key_is_named(tmp_path: Path) -> None:
    assert complaint(tmp_path, {"models": [{"path": "x"}]}).startswith("models.0.name: missing; it must be 1 to 64")


def test_a_value_of_a_variable_is_told_in_its_name(tmp_path: Path) -> None:
    said = complaint(tmp_path, STABLE_AUDIO_MAX_STEPS="8.5")
    assert said == "STABLE_AUDIO_MAX_STEPS: must be a whole number from 1 to 1000 (got '8.5')"


@pytest.mark.parametrize(
    "storage",
    [{"secret_access_key": ["hush"]}, ["hush"], {"endpoint_url": "https://me:hush@s3.example"}],
)
def test_what_may_hold_a_secret_is_not_shown(tmp_path: Path, storage: object) -> None:
    said = complaint(tmp_path, {"storage": storage})
    assert "storage" in said
    assert "hush" not in said


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("STABLE_AUDIO_DEFUALT_MODEL", "STABLE_AUDIO_DEFUALT_MODEL: unknown; did you mean STABLE_AUDIO_DEFAULT_MODEL?"),
        ("STABLE_AUDIO_MAX_STEP", "STABLE_AUDIO_MAX_STEP: unknown; did you mean STABLE_AUDIO_MAX_STEPS?"),
        ("STABLE_AUDIO_QQQQ", "STABLE_AUDIO_QQQQ: unknown variable"),
    ],
)
def test_a_variable_with_our_prefix_that_is_none_of_ours_is_refused(tmp_path: Path, name: str, said: str) -> None:
    assert complaint(tmp_path, **{name: "x"}) == said
    (tmp_path / ".env").write_text(f"{name}=x\n")
    assert complaint(tmp_path) == said


def test_what_kubernetes_sets_for_a_service_named_like_us_is_left_alone(tmp_path: Path) -> None:
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
    said = complaint(tmp_path, **given | {"STABLE_AUDIO_PORT": "8000"})
    assert said.startswith("STABLE_AUDIO_PORT: unknown")


def test_every_variable_of_ours_is_accepted_and_none_is_too_far_from_its_misspelling(tmp_path: Path) -> None:
    for name in (name for names in VARIABLES.values() for name in names if name.startswith("STABLE_AUDIO_")):
        said = complaint(tmp_path, **{name[:-2] + name[-1]: "1"})
        assert f"did you mean {name}?" in said


def test_every_pattern_is_told_in_words() -> None:
    def patterns(node: Any, where: str) -> Iterator[tuple[str, Any]]:
        for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
            yield from patterns(value, f"{where}/{key}")
        if isinstance(node, dict) and isinstance(node.get("pattern"), str):
            yield where, node.get("form")

    found = dict(patterns(Settings.model_json_schema(), ""))
    assert len(found) > 5
    assert [where for where, form in found.items() if not form] == []
