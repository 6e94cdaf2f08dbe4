"""The files and commands of the wheel. The commands run in an empty directory, so that they cannot use the checkout.

`tests/serving/test_lifecycle.py` starts a server from the wheel.
"""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.goldens import OPEN_GOLDENS
from tests.packaging.wheel import ROOT, build_wheel, install_wheel

pytestmark = [pytest.mark.server, pytest.mark.slow]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install_wheel(wheel, tmp_path_factory.mktemp("installed"))


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


def test_wheel_has_the_default_configuration(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packaged = archive.read("stable_audio_serve/serve_config.yaml")
    assert packaged == (ROOT / "serve_config.yaml").read_bytes()


def test_wheel_contains_only_the_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"stable_audio_serve"}


def test_commands_find_the_packaged_configuration(installed: Path, tmp_path: Path) -> None:
    result = run(installed, tmp_path, "stable-audio-serve", "config")
    assert result.stderr.startswith("configuration: the packaged one, which serves the demo model")
    assert "- name: demo" in result.stdout
    assert list(tmp_path.iterdir()) == []
    assert run(installed, tmp_path, "stable-audio-serve", "init").returncode == 0
    assert (tmp_path / "serve_config.yaml").read_bytes() == (ROOT / "serve_config.yaml").read_bytes()
    assert run(installed, tmp_path, "stable-audio-serve", "config").stderr == "configuration: serve_config.yaml\n"


def test_wheel_verifies_reference_numbers(installed: Path, tmp_path: Path) -> None:
    result = run(installed, tmp_path, "stable-audio-serve", "verify", str(OPEN_GOLDENS / "common"))
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.endswith("verification passed\n")
    refused = run(installed, tmp_path, "stable-audio-serve", "verify", "tests/data/goldens/sao/common")
    assert refused.returncode == 1
    assert "Reference numbers are in tests/data/goldens of a source checkout" in refused.stdout


def test_demo_generates_in_an_empty_directory(installed: Path, tmp_path: Path) -> None:
    program = """
import asyncio, sys
from stable_audio_serve.core.generation import GenerationRequest
from stable_audio_serve.engine import Engine
from stable_audio_serve.models.families import load_model
from stable_audio_serve.models.registry import resolve_entry

async def main():
    engine = Engine(load_model(resolve_entry("demo")))
    await engine.start()
    result = await engine.generate(GenerationRequest(prompt="a 440 Hz sine tone", duration_s=1.0, seed=1))
    await engine.close()
    print(sys.modules["stable_audio_serve"].__file__, result.audio[0].shape, abs(result.audio[0]).max() > 0.01)

asyncio.run(main())
"""
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout == f"{installed / 'stable_audio_serve' / '__init__.py'} (2, 44100) True\n", result.stderr
