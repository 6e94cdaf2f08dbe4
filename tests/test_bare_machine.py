"""The engine and its benchmark run where only torch, numpy, transformers, safetensors and their needs are installed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.goldens import SA3_GOLDENS

ROOT = Path(__file__).parent.parent
ABSENT = re.compile(
    r"(?:_?ray|fastapi|starlette|uvicorn|pydantic\w*|_?soundfile\w*|soxr|structlog|typer\w*|rich|httptools|multipart"
    r"|python_multipart|stable_audio_serve|__editable__.*)(?:-.*|\..*)?",
    re.IGNORECASE,
)


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The installed packages without those of the web, Ray and audio files."""
    folder = tmp_path_factory.mktemp("packages")
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if not ABSENT.fullmatch(entry.name) and entry.suffix != ".pth":
            (folder / entry.name).symlink_to(entry)
    return folder


def run(packages: Path, *arguments: str) -> None:
    """`python arguments` without the usual site-packages."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(packages)]), "PYTHONNOUSERSITE": "1"}
    done = subprocess.run(
        [sys.executable, "-S", *arguments], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_machine_is_bare(packages: Path) -> None:
    absent = ["ray", "fastapi", "pydantic", "soundfile", "soxr", "structlog", "typer", "rich"]
    run(packages, "-c", f"from importlib.util import find_spec; assert not any(map(find_spec, {absent}))")


def test_engine_models_and_sampling_import(packages: Path) -> None:
    modules = ("engine", "models.families", "sampling", "audio.prepare", "verification")
    run(packages, "-c", "; ".join(f"import stable_audio_serve.{module}" for module in modules))
    run(packages, "-c", "import benchmarks.cases.open")


@pytest.mark.slow
def test_the_engine_benchmark_runs(packages: Path, tmp_path: Path) -> None:
    run(
        packages, "-m", "benchmarks", "engine", "--mode", "fast", "--rounds", "1",
        "--model", str(SA3_GOLDENS / "sharp-s"), "--out", str(tmp_path),
    )  # fmt: skip
    assert json.loads((tmp_path / "engine-fast.json").read_text())["results"]["throughput_ratio"] > 0
