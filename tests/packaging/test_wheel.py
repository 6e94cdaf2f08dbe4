"""The wheel alone, without the checkout it was built from: its commands, run in an empty directory."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.serving.launched import LaunchedServer

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", ".", "--no-build-isolation", "--wheel-dir", str(folder))
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the wheel installs; everything else comes from the environment of the tests."""
    folder = tmp_path_factory.mktemp("installed")
    pip("install", str(wheel), "--target", str(folder))
    return folder


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments, "--no-index", "--no-deps"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def run(installed: Path, folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    program, *arguments = command
    return subprocess.run(
        [str(installed / "bin" / program), *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_it_has_the_default_configuration_of_the_checkout(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packaged = archive.read("stable_audio_serve/serve_config.yaml")
    assert packaged == (ROOT / "serve_config.yaml").read_bytes()


def test_its_commands_find_the_configuration_in_it(installed: Path, tmp_path: Path) -> None:
    result = run(installed, tmp_path, "stable-audio-serve", "config")
    assert result.stderr.startswith("configuration: the packaged one, which serves the demo model")
    assert "- name: demo" in result.stdout
    assert list(tmp_path.iterdir()) == []
    assert run(installed, tmp_path, "stable-audio-serve", "init").returncode == 0
    assert (tmp_path / "serve_config.yaml").read_bytes() == (ROOT / "serve_config.yaml").read_bytes()
    assert run(installed, tmp_path, "stable-audio-serve", "config").stderr == "configuration: serve_config.yaml\n"


@pytest.mark.ray
def test_it_serves_the_demo_in_an_empty_directory(installed: Path, tmp_path: Path) -> None:
    server = LaunchedServer(
        tmp_path / "serve_config.yaml",  # which is not there
        program=[str(installed / "bin" / "stable-audio-serve"), "serve"],
        environment={"PYTHONPATH": str(installed)},
    ).wait_until_ready()
    try:
        assert "configuration: the packaged one" in server.output
        assert "default model: demo (the only model)" in server.output
        answer = server.client.post("/v1/audio/generations", json={"prompt": "a 440 Hz sine tone", "duration": 1})
        assert answer.headers["X-Model"] == "demo"
        assert len(answer.content) == 44 + 2 * 2 * 44_100
    finally:
        server.stop()
