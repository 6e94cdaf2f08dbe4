"""Which failed deployments end the start of a server, and what a start that takes long waits for."""

from __future__ import annotations

import shutil
from types import SimpleNamespace
from typing import Any

import pytest

from stable_audio_serve.core.errors import ModelUnavailableError, StartError
from stable_audio_serve.core.settings import Settings
from stable_audio_serve.launcher.embedded import private_directory
from stable_audio_serve.launcher.launch import describe_wait, find_proxy_fault, raise_if_failed
from stable_audio_serve.serving.placement import plan_deployments

ERROR = "ray.exceptions: stable_audio_serve.core.errors.CheckpointError: model.safetensors is corrupt\nat line 1"
PLAN = plan_deployments(Settings.model_validate({"models": [{"name": "demo"}, {"name": "small-sfx"}]}))


def application(status: str, **deployments: str) -> Any:
    found = {
        name.replace("_", "-"): SimpleNamespace(status=own, message=ERROR if "FAIL" in own else "")
        for name, own in deployments.items()
    }
    return SimpleNamespace(status=status, message="", deployments=found)


@pytest.mark.parametrize("name", ["Ingress", "job_runner", "small_sfx"])  # small-sfx is the default model
def test_failure_of_a_needed_deployment_ends_the_start(name: str) -> None:
    with pytest.raises(ModelUnavailableError, match=r"^model.safetensors is corrupt$"):
        raise_if_failed(application("DEPLOY_FAILED", **{name: "DEPLOY_FAILED", "demo": "DEPLOY_FAILED"}), PLAN)


def test_failure_of_a_model_that_need_not_start_is_no_failure() -> None:
    raise_if_failed(application("UNHEALTHY", Ingress="HEALTHY", small_sfx="UPDATING", demo="DEPLOY_FAILED"), PLAN)
    raise_if_failed(application("DEPLOYING", Ingress="UPDATING"), PLAN)


def test_application_that_failed_without_a_deployment_ends_the_start() -> None:
    with pytest.raises(ModelUnavailableError):
        raise_if_failed(application("DEPLOY_FAILED"), PLAN)


def test_failed_application_is_explained_without_its_traceback() -> None:
    failed = application("DEPLOY_FAILED")
    failed.message = 'Traceback (most recent call last):\n  File "x.py", line 1\nValueError: no such deployment\n'
    with pytest.raises(ModelUnavailableError, match=r"^ValueError: no such deployment$"):
        raise_if_failed(failed, PLAN)


@pytest.mark.parametrize(
    ("output", "fault"),
    [
        ("error: no haproxy program found", "no haproxy program found"),
        (
            "[NOTICE]   (16172) : haproxy version is 2.8.25\n[ALERT]    (16172) : Binding [/tmp/x/haproxy.cfg:54] for "
            "frontend http_frontend: cannot bind socket (Address already in use) for [127.0.0.1:18141]\n[ALERT] : x",
            "HAProxy cannot bind socket (Address already in use) for [127.0.0.1:18141]",
        ),
        ("exit code 1", None),
    ],
)
def test_reason_why_haproxy_does_not_start_is_found(output: str, fault: str | None) -> None:
    text = f"ray::HAProxyManager.ready()\nRuntimeError: HAProxy crashed during startup: {output}\n"
    assert find_proxy_fault(text) == fault


def test_waiting_start_names_the_models_that_are_not_loaded() -> None:
    models: list[dict[str, str]] = [{"name": "demo"}, {"name": "small-sfx"}]
    plan = plan_deployments(Settings.model_validate({"models": models, "preload_models": ["demo", "small-sfx"]}))
    assert describe_wait(None, plan, downloads={}) == "still loading demo, small-sfx ..."
    assert describe_wait(application("DEPLOYING", demo="HEALTHY"), plan, downloads={}) == "still loading small-sfx ..."
    loaded = application("RUNNING", demo="HEALTHY", small_sfx="HEALTHY")
    assert describe_wait(loaded, plan, downloads={}) == "still starting ..."


def test_full_disk_for_temporary_files_is_named_before_ray_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=4096))
    with pytest.raises(StartError, match=r"^the disk of /\S+ is full: make room there"), private_directory():
        pytest.fail("a folder was made on a full disk")
