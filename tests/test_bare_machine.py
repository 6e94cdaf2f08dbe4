"""The engine, its benchmark and the tests for a GPU run where only torch, numpy, transformers, safetensors, pytest and
their needs are installed.
"""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.bare_machine import ABSENT, BareMachine, bare_machine
from tests.goldens import SA3_GOLDENS

__all__ = ["bare_machine"]


def test_the_machine_is_bare(bare_machine: BareMachine) -> None:
    bare_machine.run("-c", f"from importlib.util import find_spec; assert not any(map(find_spec, {ABSENT}))")


def test_engine_models_and_sampling_import(bare_machine: BareMachine) -> None:
    modules = ("engine", "models.families", "sampling", "audio.prepare", "verification")
    bare_machine.run("-c", "; ".join(f"import stable_audio_serve.{module}" for module in modules))
    bare_machine.run("-c", "import benchmarks.cases.open")


@pytest.mark.slow
def test_the_engine_benchmark_runs(bare_machine: BareMachine, tmp_path: Path) -> None:
    bare_machine.run(
        "-m", "benchmarks", "engine", "--mode", "fast", "--rounds", "1",
        "--model", str(SA3_GOLDENS / "sharp-s"), "--out", str(tmp_path),
    )  # fmt: skip
    assert json.loads((tmp_path / "engine-fast.json").read_text())["results"]["throughput_ratio"] > 0


@pytest.mark.slow
def test_make_test_gpu_runs_there_without_installing(bare_machine: BareMachine, tmp_path: Path) -> None:
    chosen = "memory_of_the_device or window_noise or (test_denoiser and tiny)"
    printed = bare_machine.run_command(
        "make", "test-gpu", f"PY={bare_machine.python}", f"OUT={tmp_path}", f"ARGS=-k '{chosen}'",
        environment={"STABLE_AUDIO_TEST_DEVICE": "cpu"},
    )  # fmt: skip
    assert "pip install" not in printed
    suite = ElementTree.parse(tmp_path / "tests.xml").getroot()[0]
    counts = {name: suite.get(name) for name in ("tests", "failures", "errors", "skipped")}
    assert counts == {"tests": "4", "failures": "0", "errors": "0", "skipped": "0"}


def test_make_test_gpu_with_an_interpreter_of_its_own_needs_no_environment(bare_machine: BareMachine) -> None:
    planned = bare_machine.run_command("make", "--dry-run", "--always-make", "test-gpu", "PY=python3", "OUT=there")
    assert planned.split("\n", 1)[0].startswith("python3 -m pytest")
    assert "there/tests.xml" in planned
    assert len(planned.strip().splitlines()) == 1, planned
