"""`stable-audio-serve doctor` prints the result and the remedy of each check. It leaves no files behind."""

from __future__ import annotations

import json
import os
import re
import socket
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils import collect_env
from typer.testing import CliRunner, Result

from stable_audio_serve.artifacts import s3
from stable_audio_serve.artifacts.s3_client import check_bucket
from stable_audio_serve.cli import app
from stable_audio_serve.core.keys import hash_key
from stable_audio_serve.core.settings import ModelSettings, Settings
from stable_audio_serve.doctor import machine, models
from stable_audio_serve.doctor.issue_report import redact
from stable_audio_serve.engine.options import PLAIN, Features
from stable_audio_serve.engine.profile import Profile
from stable_audio_serve.serving.placement import plan_deployments
from tests.adapter_files import write_file
from tests.goldens import SA3_GOLDENS
from tests.models.hub import Repo, checkpoint_files, pointing_library_at, running_hub
from tests.serving.launched import free_port, write_config

CLOSED = "127.0.0.1:9"  # no server listens there
ABSENT = {"name": "absent", "path": "/absent/model"}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns an empty folder, in which the commands run."""
    for name in [name for name in os.environ if name.startswith(("STABLE_AUDIO_", "AWS_", "R2_"))]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def doctor(*options: str, models: list[dict[str, Any]], port: int | None = None, **settings: Any) -> Result:
    write_config(Path(), {"models": models, **settings}, http_options={"port": port or free_port()})
    result = CliRunner().invoke(app, ["doctor", *options])
    assert "Traceback" not in result.output
    return result


def findings(*options: str, **settings: Any) -> dict[str, dict[str, str]]:
    """Returns the findings that `doctor --json` prints, by check. If a check has several, only the last is returned."""
    result = doctor("--json", *options, **settings)
    printed = json.loads(result.stdout)
    assert printed.keys() == {"ok", "findings"}
    for finding in printed["findings"]:
        assert finding.keys() == {"check", "state", "message", "advice"}
    assert printed["ok"] == all(finding["state"] != "failure" for finding in printed["findings"])
    assert result.exit_code == (0 if printed["ok"] else 1), result.output
    return {finding["check"]: finding for finding in printed["findings"]}


def test_the_demo_is_all_ok(folder: Path) -> None:
    result = doctor("--features", models=[{"name": "demo", "device": "cpu", "engine": {"warmup_budget_s": 0.2}}])
    assert result.exit_code == 0, result.output
    *lines, summary = result.stdout.splitlines()
    assert summary == "all ok"
    assert [line for line in lines if not line.startswith("ok ")] == []
    shown = "\n".join(lines)
    for part in ("Python", "torch", "ports", "HAProxy", "job store", "demo: files", "plain (no GPU)", "a minute"):
        assert part in shown
    assert "demo: features" in shown
    assert [path.name for path in folder.iterdir()] == ["serve_config.yaml"]


@pytest.mark.server
def test_a_missing_licence_fails_and_names_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"model_config.json": b"{}", "model.safetensors": b""}
    tuned = checkpoint_files(SA3_GOLDENS / "tiny-s")
    tuned["model_config.json"] = tuned["model_config.json"].replace(b'"num_heads"', b'"num_head"', 1)
    with (
        running_hub({"lab/model": Repo(files, gated=True, token="good"), "lab/tuned": Repo(tuned)}) as hub,
        pointing_library_at(hub.url, tmp_path / "hub"),
    ):
        monkeypatch.setenv("HF_TOKEN", "hf_of-another-account")
        found = findings(models=[{"name": name, "repo_id": f"lab/{name}"} for name in ("model", "tuned")])
    assert {found[f"{name}: files"]["state"] for name in ("model", "tuned")} == {"failure"}
    assert "num_head" in found["tuned: files"]["message"]
    assert f"lab/model is gated: accept its terms at {hub.url}/lab/model" in found["model: files"]["message"]
    assert not {"model: memory", "model: speed", "tuned: memory"} & set(found)


def pretend_gpu(monkeypatch: pytest.MonkeyPatch, *, free: int, total: int) -> None:
    for name, value in {
        "is_available": True,
        "device_count": 1,
        "get_device_properties": SimpleNamespace(name="Stand-in", major=9, minor=0),
        "get_device_capability": (9, 0),
        "mem_get_info": (free, total),
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)


@pytest.mark.parametrize("max_memory_bytes", [None, 2 * 10**9])
def test_a_gpu_that_other_programs_fill_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_memory_bytes: int | None
) -> None:
    pretend_gpu(monkeypatch, free=7_500_000_000, total=24 * 10**9)
    with pointing_library_at(f"http://{CLOSED}", tmp_path / "hub", is_offline=True):
        found = findings(models=[{"name": "medium", "max_memory_bytes": max_memory_bytes}])
    assert found["medium: memory"]["state"] == "failure"
    assert "(7.5 free), requests up to 0.00 GB" in found["medium: memory"]["message"]


@pytest.mark.parametrize(("gigabytes", "state"), [(4, "failure"), (24, "ok")])
def test_a_too_small_gpu_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gigabytes: int, state: str) -> None:
    pretend_gpu(monkeypatch, free=gigabytes * 10**9, total=gigabytes * 10**9)
    with pointing_library_at(f"http://{CLOSED}", tmp_path / "hub", is_offline=True):
        found = findings(models=[{"name": "medium"}])
    assert found["GPU 0"]["state"] == "failure"  # the fake GPU cannot run kernels
    memory = found["medium: memory"]
    assert memory["state"] == state
    if state == "ok":
        assert memory["message"].startswith("weights take 6.88 GB of the GPU's 24.0 GB (24.0 free), requests up to 1")
    else:
        assert "its weights take 6.88 GB; it needs a larger GPU" in memory["message"]
    assert found["medium: profile"]["message"].startswith("auto")
    assert "medium: speed" not in found


def test_adapters_that_cannot_be_used_are_named(folder: Path) -> None:
    loras = {"mono": {"path": "/absent/mono.safetensors"}}
    demo = {"name": "demo", "device": "cpu", "engine": {"warmup_budget_s": 0.2}}
    result = doctor(models=[demo | {"loras": loras, "lora_folder": "/absent/loras"}])
    for fault in ("the adapter folder /absent/loras cannot be read", "adapter 'mono'"):
        assert re.search(rf"^warning +demo: adapters .*{fault}", result.stdout, re.MULTILINE)
    write_file(folder / "loras" / "octave.safetensors")
    found = findings(models=[demo | {"lora_folder": str(folder / "loras")}])["demo: adapters"]
    assert (found["state"], found["message"]) == ("ok", "octave, octave-down")


def test_a_missing_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    memory = findings(models=[{"name": "demo", "device": "cuda"}])["demo: memory"]
    assert memory["message"] == "there is no GPU here that torch can use, but the model's device is cuda"
    assert memory["advice"] is None


def test_models_that_do_not_fit_on_one_gpu_together_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    found = findings(models=[{"name": "medium", "num_gpus": 1}, {"name": "small-music"}])
    assert found["configuration"]["state"] == "failure"
    assert "models.small-music: 1 replica(s) with num_gpus 1 do not fit" in found["configuration"]["message"]


def test_a_model_that_exceeds_the_machine_is_not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "memory_bytes", lambda: 10_000_000)
    found = findings(models=[{"name": "demo", "device": "cpu"}])
    assert found["demo: memory"]["state"] == "failure"
    assert "demo: speed" not in found


@pytest.mark.parametrize(("gigabytes", "state"), [(5, "warning"), (10, "ok")])
def test_models_that_fit_only_alone_are_named(monkeypatch: pytest.MonkeyPatch, gigabytes: int, state: str) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(models, "memory_bytes", lambda: gigabytes * 10**9)
    found = findings(models=[{"name": name, "device": "cpu"} for name in ("small-sfx", "small-music")])
    assert {found[f"{name}: memory"]["state"] for name in ("small-sfx", "small-music")} == {"ok"}
    assert found["memory"]["state"] == state
    assert "the weights of 2 models together take 5." in found["memory"]["message"]


def test_the_speed_of_a_slow_machine_is_readable(monkeypatch: pytest.MonkeyPatch) -> None:
    async def take_minutes(*_: object) -> float:
        return 1000.0

    monkeypatch.setattr(models, "_time", take_minutes)
    speed = findings(models=[{"name": "demo", "device": "cpu", "engine": {"warmup_budget_s": 0.2}}])["demo: speed"]
    numbers = re.match(r"a clip of 10 s takes about (\d+) s, of 30 s (\d+) s; about \d", speed["message"])
    assert numbers, speed["message"]
    assert 1000 < int(numbers[1]) <= int(numbers[2])
    assert speed["state"] == "warning"
    assert "requests end after 900 s, jobs after 3600 s" in speed["advice"]


def test_a_taken_port_fails(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        found = findings(models=[ABSENT], port=port)
    assert found["ports"]["state"] == "failure"
    assert f"cannot listen on port {port} of 127.0.0.1: it is already in use" in found["ports"]["message"]


def test_unreachable_database_and_bucket_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "check_bucket", partial(check_bucket, budget_s=0.0))
    storage = {
        "bucket": "clips",
        "endpoint_url": f"http://{CLOSED}",
        "access_key_id": "key",
        "secret_access_key": "bucket-secret",
    }
    found = findings(
        models=[ABSENT], jobs={"database_url": f"postgresql://u:database-secret@{CLOSED}/x"}, storage=storage
    )
    assert {found[check]["state"] for check in ("job store", "files of jobs")} == {"failure"}
    assert f"PostgreSQL {CLOSED}/x cannot be used: " in found["job store"]["message"]
    assert "storage.endpoint_url" in found["files of jobs"]["message"]
    assert "-secret" not in json.dumps(found)


def test_an_existing_database_is_not_changed(folder: Path) -> None:
    (folder / "outputs").mkdir()
    (folder / "outputs" / "jobs.db").touch()
    found = findings(models=[ABSENT])
    assert {found[check]["state"] for check in ("job store", "files of jobs")} == {"ok"}
    assert (folder / "outputs" / "jobs.db").read_bytes().count(b"CREATE TABLE") == 0


def test_a_faulty_configuration_is_one_failure(folder: Path) -> None:
    found = findings(models=[], modles=[])
    assert list(found) == ["Python", "torch", "GPUs", "configuration"]
    assert "modles: unknown; did you mean models?" in found["configuration"]["message"]


def test_a_key_file_in_the_home_folder_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    (folder / "keys.txt").write_text(f"alice:{hash_key('secret')}\n")
    settings: dict[str, Any] = {"models": [ABSENT], "api": {"key_file": "~/keys.txt"}}
    assert findings(**settings)["configuration"]["state"] == "ok"
    (folder / "keys.txt").unlink()
    assert f"{folder}/keys.txt: it cannot be read" in findings(**settings)["configuration"]["message"]


def test_a_value_that_ray_serve_refuses_fails(folder: Path) -> None:
    write_config(folder, {"models": [ABSENT]}, proxy_location="Sideways")
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "proxy_location: Input should be" in result.stdout


def test_an_unexpected_exception_fails_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("of a check\nwith a second line")

    monkeypatch.setattr(machine, "check_torch", fail)
    monkeypatch.setattr(models.engines, "load_engine", fail)
    found = findings(models=[{"name": "demo", "device": "cpu"}])
    for check in ("torch", "demo: speed"):
        assert (found[check]["state"], found[check]["message"]) == ("failure", "ZeroDivisionError: of a check")
        assert found[check]["advice"]
    assert found["demo: memory"]["state"] == "ok"


@pytest.mark.parametrize(("no_color", "escape"), [("", True), ("1", False)])
def test_colors_can_be_switched_off(monkeypatch: pytest.MonkeyPatch, no_color: str, escape: bool) -> None:
    monkeypatch.setenv("NO_COLOR", no_color)
    result = CliRunner().invoke(app, ["doctor", "--config", "absent.yaml"], color=True)  # as on a terminal
    assert ("\x1b" in result.stdout) is escape


class TriedEngine:
    """An engine with the configured features. Its check at the start finds that the audio of packed calls is wrong."""

    def __init__(self, _: Settings, model: ModelSettings) -> None:
        features = Features(**model.engine.features)
        self.profile = Profile(PLAIN, "31 dB") if features.packing else Profile(features)

    async def __aenter__(self) -> TriedEngine:
        return self

    async def __aexit__(self, *_: object) -> None: ...


def test_each_feature_is_tried_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models.engines, "load_engine", TriedEngine)
    model = ModelSettings(name="demo", device="cuda")
    checks = models.ModelChecks(plan_deployments(Settings(models=(model,))), model, num_gpus=1)
    found = {finding.check: (finding.state, finding.message) for finding in checks.features()}
    assert found.pop("demo: packing") == ("failure", "ValueError: 31 dB")
    agrees = ("ok", "agrees with the plain path")
    assert found == {f"demo: {name}": agrees for name in ("captures", "second_queue", "fast_decoding", "fused_kernels")}


def test_no_feature_is_tried_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "memory_bytes", lambda: 0)  # loads no model
    found = findings("--features", models=[{"name": "demo", "device": "cpu"}])
    assert (found["demo: features"]["state"], found["demo: features"]["message"]) == ("ok", "none to try on cpu")


def test_the_report_has_no_secret_and_no_foreign_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = folder / "home" / "alice"
    secrets = ("hf_abcdefgh12", "database-secret", "bucket-secret", "whsec_" + "c2VjcmV0" * 4, "client-api-secret")
    token, database, bucket, webhook, key = secrets
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("STABLE_AUDIO_API_KEY", key)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # named like a secret

    def fail() -> None:
        raise RuntimeError(f"in {home}/private/x.py and /opt/other/lib/y.so: {' '.join(secrets)} postgresql://u:p@h/d")

    monkeypatch.setattr(machine, "check_python", fail)
    monkeypatch.setattr(collect_env, "get_pretty_env_info", lambda: f"PyTorch version: 2\nat {home}/env/bin/python")
    monkeypatch.setattr(s3, "check_bucket", lambda *_, **__: None)
    path = str(home / "models" / "mine")
    doctor(
        *("--report", "report.json"),
        models=[{"name": "mine", "path": path}],
        hf_token=token,
        jobs={"database_url": f"postgresql://u:{database}@{CLOSED}/x", "webhook_secret": webhook},
        storage={"bucket": "clips", "access_key_id": "key-id", "secret_access_key": bucket},
    )
    text = Path("report.json").read_text()
    report = json.loads(text)
    assert [
        secret for secret in (*secrets, "u:p@", "key-id", str(home), "private", "/opt", "env/bin") if secret in text
    ] == []
    assert report["settings"]["models"][0]["path"] == "~/models/mine"  # the configuration's own path
    assert report["settings"]["models"][0]["compile"] is False
    assert report["findings"][0]["message"].startswith("RuntimeError: in .../x.py and .../y.so: ***")
    assert report["settings"]["jobs"]["database_url"] == f"postgresql://**********@{CLOSED}/x"
    assert "STABLE_AUDIO_API_KEY" in report["variables"]
    assert report["machine"][:2] == ["PyTorch version: 2", "at .../python"]


@pytest.mark.parametrize("home", ["/", "", "/h"])
def test_redaction_keeps_text_that_is_no_path(home: str) -> None:
    text = '"1/2, N/A, http://host:80/v1/audio, text/plain, /health, 8 GB/s, /h/x/y, and/or, v2.1"'
    assert redact(text, kept=["/h/x"], secrets=[], environ={"HOME": home}).replace("~", "/h") == text
