"""All commands look for the configuration file in the same places and print its path. `init` writes such a file."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from stable_audio_serve import __version__
from stable_audio_serve.cli import app
from stable_audio_serve.cli.serving import stable_audio_api
from stable_audio_serve.core.settings import Settings
from stable_audio_serve.core.settings_sources import load_settings
from stable_audio_serve.serving import serve_file
from tests.patience import PATIENCE_S
from tests.serving.launched import free_port

ROOT = Path(__file__).parents[2]
Run = Callable[..., Result]
_MISTYPED = "applications: [{import_path: 'a:b', arg: {}}]\nhtp_options: {port: 3}\n"
_COMPLAINT = (
    "serve_config.yaml: applications.0.arg: unknown; did you mean args?; htp_options: unknown; "
    "did you mean http_options?"
)
COMMANDS = [["config"], ["admin", "jobs", "list"], ["serve"]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Change to an empty directory. Returns a function that runs a command there."""
    for name in [name for name in os.environ if name.startswith("STABLE_AUDIO_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(app, arguments)


def write_faulty(path: Path) -> None:
    """Write a configuration with a misspelled key. Every command refuses it, so no server starts."""
    path.write_text("applications: [{import_path: 'a:b', args: {modles: []}}]\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_the_local_config_is_used_unless_config_names_another(run: Run, tmp_path: Path, command: list[str]) -> None:
    write_faulty(tmp_path / "serve_config.yaml")
    here = run(*command)
    assert (here.exit_code, here.stderr) == (
        2,
        "configuration: serve_config.yaml\nerror: modles: unknown; did you mean models?\n",
    )
    write_faulty(tmp_path / "other.yaml")
    assert run(*command, "--config", "other.yaml").stderr.startswith("configuration: other.yaml\nerror: modles")
    assert "absent.yaml does not exist" in run(*command, "--config", "absent.yaml").stderr


@pytest.mark.parametrize("command", COMMANDS[:2])
def test_a_mistyped_key_beside_args_is_named(run: Run, tmp_path: Path, command: list[str]) -> None:
    (tmp_path / "serve_config.yaml").write_text(_MISTYPED)
    result = run(*command)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"configuration: serve_config.yaml\nerror: {_COMPLAINT}\n"


@pytest.mark.server
def test_a_mistyped_key_is_named_before_the_default_models(run: Run, tmp_path: Path) -> None:
    """The error must name the misspelled key, not a default model.

    If the key were ignored, the server would use the default models, whose weights are missing. The command runs in a
    new process, because Ray reads the environment when it is imported.
    """
    (tmp_path / "serve_config.yaml").write_text(_MISTYPED)
    done = subprocess.run(
        [sys.executable, "-m", "stable_audio_serve.cli", "serve", "--port", str(free_port())],
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == f"configuration: serve_config.yaml\nerror: {_COMPLAINT}\n"
    assert "default model" not in done.stdout


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ("models: [{name: demos}]", "models: 'demos' is not built in"),
        ("models: [{name: demo}], default_model: dmo", "default_model (STABLE_AUDIO_DEFAULT_MODEL or "),
        ("models: [{name: demo}], preload_models: [demoo]", "preload_models (STABLE_AUDIO_PRELOAD_MODELS): unknown"),
        ("models: [{name: demo}], dialects: {model: dmo}", "dialects.model"),
    ],
)
def test_config_refuses_the_same_model_names_as_serve(run: Run, tmp_path: Path, args: str, expected: str) -> None:
    (tmp_path / "serve_config.yaml").write_text(f"applications: [{{import_path: 'a:b', args: {{{args}}}}}]\n")
    result = run("config")
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"error: {expected}" in result.stderr
    assert os.listdir(tmp_path) == ["serve_config.yaml"]  # the command created no job store


@pytest.mark.parametrize("command", COMMANDS[:2])
def test_the_packaged_config_is_used_without_a_file(run: Run, command: list[str]) -> None:
    result = run(*command)
    assert result.stderr.startswith("configuration: the packaged one, which serves the demo model; `stable-audio-serve")
    if command == ["config"]:
        assert [model["name"] for model in yaml.safe_load(result.stdout)["models"]] == ["demo"]
    if command == ["admin", "jobs", "list"]:
        assert "there are no jobs yet" in result.stderr


def test_files_that_cannot_be_looked_up_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "x" * 300  # too long: even root gets an error, as other users do in a private folder
    monkeypatch.setattr(serve_file, "_FILE_NAME", name)
    assert serve_file.find_serve_file(None) == serve_file.PACKAGED_FILE
    assert load_settings(environ={}, directory=tmp_path / name) == Settings()


def test_init_writes_the_commented_default_once(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = tmp_path / "serve_config.yaml"
    assert run("init").stdout == "wrote serve_config.yaml; start the server with: stable-audio-serve serve\n"
    assert written.read_text() == (ROOT / "serve_config.yaml").read_text()
    assert "configuration: serve_config.yaml" in run("config").stderr
    written.write_text("mine")
    refused = run("init")
    assert (refused.exit_code, refused.stderr) == (2, "error: serve_config.yaml exists already; --force replaces it\n")
    assert written.read_text() == "mine"
    for _ in range(2):
        assert run("init", "--force").exit_code == 0
        assert written.read_text() == (ROOT / "serve_config.yaml").read_text()
        monkeypatch.setattr(serve_file, "PACKAGED_FILE", written)  # as in a checkout of the repository
    assert run("init", "my.yaml").stdout.endswith("stable-audio-serve serve --config my.yaml\n")
    nowhere = run("init", "absent/my.yaml")
    assert (nowhere.exit_code, nowhere.stderr) == (
        2,
        "error: absent/my.yaml cannot be written: No such file or directory\n",
    )
    (tmp_path / "folder").mkdir()
    assert run("init", "folder").stderr == "error: folder is a folder; name a file\n"


def test_every_commented_line_of_the_default_is_valid(run: Run, tmp_path: Path) -> None:
    text, num_keys = re.subn(r"(?m)^( *)# ( *(?:- )?[a-z_]+:.*)$", r"\1\2", (ROOT / "serve_config.yaml").read_text())
    assert num_keys > 15
    (tmp_path / "serve_config.yaml").write_text(text)
    result = run("config")
    assert result.exit_code == 0, result.stderr
    settings = yaml.safe_load(result.stdout)
    assert [model["name"] for model in settings["models"]] == [
        "demo",
        "small-sfx",
        "small-music",
        "medium",
        "stable-audio-open-1.0",
        "stable-audio-open-small",
        "my-fine-tune",
    ]
    assert (settings["metrics"]["port"], settings["api"]["public_url"]) == (9090, "https://audio.example.org")
    assert (settings["audio"]["peaks"], settings["drain_s"]) == ("limit", 20)
    assert yaml.safe_load(text)["http_options"] == {"host": "0.0.0.0", "port": 8000}


def test_the_version_option_prints_the_version(run: Run) -> None:
    assert run("--version").stdout == f"{__version__}\n"


@pytest.mark.server
@pytest.mark.parametrize(
    ("typed", "completed"), [("se", "serve"), ("admin dead", "dead-letters"), ("serve --pro", "--proxy")]
)
def test_the_shell_completes_commands_and_options(typed: str, completed: str) -> None:
    words = {"COMP_WORDS": f"stable-audio-serve {typed}", "COMP_CWORD": str(typed.count(" ") + 1)}
    result = subprocess.run(
        [str(Path(sys.executable).parent / "stable-audio-serve")],
        env=os.environ | {"_STABLE_AUDIO_SERVE_COMPLETE": "complete_bash"} | words,
        capture_output=True,
        text=True,
        check=False,
    )
    assert completed in result.stdout.split(), result.stderr


def test_the_proxy_can_be_set_in_the_env_file(run: Run, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("STABLE_AUDIO_PROXY=python\n")
    assert yaml.safe_load(run("config").stdout)["proxy"]["kind"] == "python"


@pytest.mark.server
@pytest.mark.slow
def test_stable_audio_api_serves_the_stable_audio_3_models(run: Run, tmp_path: Path) -> None:
    """The command serves all Stable Audio 3 models, even if `.env` names other models to preload.

    No weights are on disk and the hub is offline, so the start fails at the first model.
    """
    (tmp_path / ".env").write_text(
        "HF_HUB_OFFLINE=1\nSTABLE_AUDIO_DEFAULT_MODEL=small-music\nSTABLE_AUDIO_PRELOAD_MODELS=small-sfx\n"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from stable_audio_serve.cli.serving import stable_audio_api; stable_audio_api()",
            "--host",
            "127.0.0.1",
            "--port",
            str(free_port()),
        ],
        env=os.environ | {"HF_HOME": str(tmp_path / "hub")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout.splitlines()[-1] == "default model: small-music"
    first, *_, last = done.stderr.splitlines()
    assert first.startswith("configuration: no serve_config.yaml here; serving small-sfx, small-music and medium")
    assert last.startswith("error: model small-sfx: stabilityai/stable-audio-3-small-sfx is not complete in ")


def test_stable_audio_api_reads_the_local_config_and_refuses_reload(run: Run, tmp_path: Path) -> None:
    write_faulty(tmp_path / "serve_config.yaml")
    result = CliRunner().invoke(stable_audio_api, ["--host", "0.0.0.0", "--port", "8000"])
    assert result.stderr == "configuration: serve_config.yaml\nerror: modles: unknown; did you mean models?\n"
    refused = CliRunner().invoke(stable_audio_api, ["--reload"])
    assert (refused.exit_code, refused.stderr) == (
        2,
        "error: --reload: not supported; restart the server after a change\n",
    )
