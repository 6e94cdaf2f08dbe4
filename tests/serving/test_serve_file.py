"""Reading configuration files. An error names every mistake in the file."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from stable_audio_serve.core.errors import ConfigError
from stable_audio_serve.serving.serve_file import ServeFile, deploy_schema, read_serve_file

_APPLICATION = "applications:\n- name: audio\n  import_path: package.module:build\n"


def make_file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "serve.yaml"
    path.write_text(text)
    return path


def read(tmp_path: Path, text: str) -> ServeFile:
    return read_serve_file(make_file(tmp_path, text))


def test_defaults_listen_on_this_machine_only(tmp_path: Path) -> None:
    file = read(tmp_path, _APPLICATION)
    assert (file.host, file.port, file.application, file.route_prefix, file.args) == (
        "127.0.0.1",
        8000,
        "audio",
        "",
        {},
    )


def test_address_and_prefix_of_the_file_are_used(tmp_path: Path) -> None:
    file = read(tmp_path, _APPLICATION + "  route_prefix: /audio\nhttp_options: {host: 0.0.0.0, port: 9000}\n")
    assert (file.host, file.port, file.route_prefix) == ("0.0.0.0", 9000, "/audio")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "applications"),
        ("- a\n", "applications"),
        ("applications: []\n", "applications"),
        (_APPLICATION + "- name: second\n  import_path: a:b\n", "applications"),
        (_APPLICATION + "  args: [1]\n", "args"),
        ("applications: [\n", "serve.yaml"),
        (_APPLICATION + "  route_prefix: audio\n", "route_prefix"),
        (_APPLICATION + "  route_prefix: /audio/\n", "route_prefix"),
        (_APPLICATION + "http_options: {port: eight}\n", "port"),
        (_APPLICATION + "http_options: {port: 70000}\n", "port"),
        (_APPLICATION + "http_options: [1]\n", "http_options"),
        ("applications: [\n", r"line 2, column 1: expected the node content"),
        (
            _APPLICATION + "  args:\n    api: {}\n    api: {max_steps: 3}\n",
            r"line 6, column 5: the key api appears twice",
        ),
        ("http_options: {host: 2026-13-45}\n", "serve.yaml: not a YAML file: month must be in 1..12"),
        ("http_options: {port: !!timestamp eight}\n", "serve.yaml: not a YAML file"),
        ("? {a: 1} : 2\n", "serve.yaml: not a YAML file"),
        ("a: " + "[" * 1000, "serve.yaml: not a YAML file"),
    ],
)
def test_unusable_file_is_refused_by_name(tmp_path: Path, text: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        _ = read(tmp_path, text).port


def test_file_in_another_encoding_is_refused(tmp_path: Path) -> None:
    path = make_file(tmp_path, "")
    path.write_text(_APPLICATION, encoding="utf-16")
    with pytest.raises(ConfigError, match=r"serve\.yaml: it is not UTF-8 text$"):
        read_serve_file(path)


def test_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml does not exist; `stable-audio-serve init`"):
        read_serve_file(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ("modles: []\n", "modles: unknown; valid: proxy_location, http_options, "),
        ("http_options: {prot: 8000}\n", "http_options.prot: unknown; did you mean port?"),
        ("  deployment: []\n", "applications.0.deployment: unknown; did you mean deployments?"),
        ("  num_gpus: 1\n", "applications.0.num_gpus: unknown; valid: name, route_prefix, import_path, "),
        (
            "  deployments: [{name: small, num_replica: 2}]\n",
            "applications.0.deployments.0.num_replica: unknown; did you mean num_replicas?",
        ),
        (
            "  deployments: [{name: small, autoscaling_config: {min_replica: 2}}]\n",
            "applications.0.deployments.0.autoscaling_config.min_replica: unknown; did you mean min_replicas?",
        ),
        (
            "  deployments: [{name: small, ray_actor_options: {num_gpu: 1}}]\n",
            "applications.0.deployments.0.ray_actor_options.num_gpu: unknown; did you mean num_gpus?",
        ),
    ],
)
def test_key_unknown_to_ray_serve_is_refused_by_name(tmp_path: Path, extra: str, named: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"serve.yaml: {named}")):
        deploy_schema(read(tmp_path, _APPLICATION + extra), host="127.0.0.1", port=8000)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (
            "proxy_location: Sideways\n",
            "proxy_location: Input should be 'Disabled', 'HeadOnly' or 'EveryNode' (got 'Sideways')",
        ),
        ("http_options: {request_timeout_s: soon}\n", "http_options.request_timeout_s: Input should be a valid number"),
        (
            "  deployments: [{name: small, max_ongoing_requests: -1}]\n",
            "applications.0.deployments.0.max_ongoing_requests: Input should be greater than 0 (got -1)",
        ),
    ],
)
def test_value_that_ray_serve_refuses_is_named_with_the_reason(tmp_path: Path, extra: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"serve.yaml: {message}")):
        deploy_schema(read(tmp_path, _APPLICATION + extra), host="127.0.0.1", port=8000)


def test_schema_carries_overrides_and_the_chosen_address(tmp_path: Path) -> None:
    text = _APPLICATION + "  args: {anything: 1}\n  deployments: [{name: small, max_ongoing_requests: 7}]\n"
    schema = deploy_schema(read(tmp_path, text), host="0.0.0.0", port=8123)
    assert (schema.http_options.host, schema.http_options.port) == ("0.0.0.0", 8123)
    (application,) = schema.applications
    assert application.args == {"anything": 1}
    assert application.deployments[0].max_ongoing_requests == 7
