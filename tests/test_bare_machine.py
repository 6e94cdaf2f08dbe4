"""The engine, its benchmarks and the tests for a GPU run where only torch, numpy, transformers, safetensors, pytest and
their needs are installed.
"""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks.goals import read_standings
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.goals import GPU_GOALS
from tests.bare_machine import ABSENT, BareMachine, bare_machine
from tests.goldens import SA3_GOLDENS

__all__ = ["bare_machine"]


def test_the_machine_is_bare(bare_machine: BareMachine) -> None:
    bare_machine.run("-c", f"from importlib.util import find_spec; assert not any(map(find_spec, {ABSENT}))")


def test_engine_models_and_sampling_import(bare_machine: BareMachine) -> None:
    modules = ("engine", "models.families", "sampling", "audio.prepare", "verification")
    imported = [*(f"stable_audio_serve.{module}" for module in modules), "benchmarks.cases.open"]
    bare_machine.run("-c", f"import {', '.join(imported)}")


@pytest.mark.slow
def test_sides_are_compared_in_one_process(bare_machine: BareMachine, tmp_path: Path) -> None:
    bare_machine.run(
        "-m", "benchmarks", "run", "--engine-only", "--against", "lock,static,ours", "--mix", "demo-fast",
        "--count", "2", "--rounds", "1", "--model", str(SA3_GOLDENS / "sharp-s"), "--out", str(tmp_path),
    )  # fmt: skip
    results = json.loads((tmp_path / "run-demo-fast.json").read_text())["results"]
    assert results["ratios"]["ours"]["lock"]["capacity"]["value"] > 0
    assert results["outputs"]["ours"]["num_identical"] == results["outputs"]["ours"]["num_clips"] > 0
    assert results["outputs"]["static"]["largest_difference"] < 1e-3


@pytest.mark.slow
def test_make_test_gpu_runs_there_without_installing(bare_machine: BareMachine, tmp_path: Path) -> None:
    chosen = "window_noise or (test_denoiser and tiny)"
    printed = bare_machine.run_command(
        "make", "test-gpu", f"PY={bare_machine.python}", f"OUT={tmp_path}", f"ARGS=-k '{chosen}'",
        environment={"STABLE_AUDIO_TEST_DEVICE": "cpu"},
    )  # fmt: skip
    assert "pip install" not in printed
    suite = ElementTree.parse(tmp_path / "tests.xml").getroot()[0]
    counts = {name: suite.get(name) for name in ("tests", "failures", "errors", "skipped")}
    assert counts == {"tests": "3", "failures": "0", "errors": "0", "skipped": "0"}


def test_make_test_gpu_with_an_interpreter_of_its_own_needs_no_environment(bare_machine: BareMachine) -> None:
    planned = bare_machine.run_command(
        "make", "--no-print-directory", "--dry-run", "--always-make", "test-gpu", "PY=python3", "OUT=there"
    )
    assert planned.split("\n", 1)[0].startswith("python3 -m pytest")
    assert "there/tests.xml" in planned
    assert len(planned.strip().splitlines()) == 1, planned


GPU_FIGURES = {
    "1-lone": ("lone_pipeline_over_tensorrt_ratio", "lone_engine_over_bare_ratio", "launches_per_engine_call"),
    "2-profile": ("gpu_busy_share", "host_gap_between_steps_ms", "roofline_share_alone", "roofline_share_crowd"),
    "3-small": (
        "capacity_over_lock_ratio",
        "capacity_over_static_ratio",
        "p95_over_lock_ratio",
        "mixes",
    ),
    "4-medium": ("capacity_over_lock_ratio", "goodput_over_lock_ratio", "goodput_over_static_ratio"),
    "5-precision": ("denoiser_db", "denoiser_cosine", "decoder_db", "strict_distinct_outputs", "soak_calls"),
}


@pytest.mark.slow
def test_make_bench_gpu_measures_every_part_there_and_nothing_twice(bare_machine: BareMachine, tmp_path: Path) -> None:
    command = "make", "bench-gpu", f"PY={bare_machine.python}", f"OUT={tmp_path}"
    printed = bare_machine.run_command(*command, environment={"STABLE_AUDIO_TEST_DEVICE": "cpu"})
    assert "pip install" not in printed
    files = {part: tmp_path / f"gpu-{part}.json" for part in GPU_FIGURES}
    results = {part: json.loads(file.read_text())["results"] for part, file in files.items()}
    for part, figures in GPU_FIGURES.items():
        assert (results[part]["left"], results[part]["failed"]) == ([], {})
        assert all(results[part][figure] for figure in figures), part
    assert results["2-profile"]["memory_growth_share"] is not None
    assert results["2-profile"]["memory_full_over_predicted_ratio"] is not None
    assert set(results["5-precision"]["strict_distinct_outputs"].values()) == {1}
    assert not any(results["5-precision"]["soak_not_finite"].values())
    decibels = results["5-precision"]["denoiser_db"]["small 5 s"]
    assert decibels["float32"] > 100 > decibels["float16"] > decibels["bfloat16"] > 20
    assert not any(sides for part in ("3-small", "4-medium") for sides in results[part]["void_sides"].values())

    left_out = ("medium", "p95_")  # by the tiny bench
    standings = [line for line in read_standings(tmp_path, GPU_GOALS) if not any(w in line.goal.what for w in left_out)]
    assert not [str(standing) for standing in standings if standing.verdict in {"not measured", "void"}]

    assert main(["--out", str(tmp_path), "--device", "cpu"]) == 0
    again = {part: json.loads(file.read_text())["results"] for part, file in files.items()}
    assert again == results
