"""The benchmark for the first run on a GPU finds features that change the audio.

A fake device replaces the GPU, and the checkpoints are tiny.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.goals import GPU_GOALS
from benchmarks.gpu.cli import PARTS
from benchmarks.gpu.engines import Machine, OpenEngine

pytestmark = [pytest.mark.slow, pytest.mark.server]

PLAIN = "plain: the device cpu has no speed features"
ROOT = Path(__file__).parents[2]
BATTERY = {"async_copies", "second_queue", "captures", "packed_rows", "fused_kernels", "half_decode", "accelerated"}


def run_first(out: Path, *options: str, device: str) -> tuple[int, dict[str, Any]]:
    """Returns the exit status and the report."""
    command = [sys.executable, "-m", "benchmarks.gpu", "first", "--device", "cpu", "--out", str(out)]
    command += ["--open-device", f"tests.gpu.stand_in:{device}", *options]
    status = subprocess.run(command, cwd=ROOT, check=False).returncode
    return status, json.loads((out / "gpu-first.json").read_text())


def test_every_part_is_done_and_nothing_differs(tmp_path: Path) -> None:
    status, report = run_first(tmp_path, "--parts", ",".join(PARTS), device="open_honest")
    results = report["results"]
    assert report["differences"] == []
    assert {name: own["state"] for name, own in results.items()} == dict.fromkeys(PARTS, "done")
    assert status == 0
    for name in ("small", "medium", "open"):
        features = results[f"battery-{name}"]["features"]
        assert features.keys() >= BATTERY
        assert features["captures"]["captured"] > 0
        assert features["captures"]["identical"] == features["captures"]["clips"] == 16
        assert results["kernels"][name]["accelerated"]["battery"]["attention"]
    assert {own["profile"] for own in results["start"]["start"].values()} == {PLAIN}
    assert results["load-small"]["load"]["compared"] > 0
    assert results["leak"]["growth_share"].keys() >= {"host_peak"}
    assert results["rows"]["rows"].keys() == {"all", "padded", "eager", "unfused"}
    assert results["decoders"]["decoders"]["float32"]["ms"] > 0
    assert results["compiled"]["features"]["medium_compiled"]["clips"] > 0
    assert results["adapters"]["adapters"].keys() == {"captured", "eager"}
    clip = results["times-small"]["clips"]["small 5 s"]
    assert clip.keys() >= {"step_ms", "decode_ms", "eager_over_captured_ratio", "over_tensorrt_ratio"}
    assert {goal.path[0] for goal in GPU_GOALS} <= results.keys()


@pytest.mark.parametrize(
    ("device", "feature"),
    [
        ("open_wrong_captures", "captures"),
        ("open_failing_captures", "captures"),
        ("open_torn_copies", "async_copies"),
        ("open_early_queue", "second_queue"),
    ],
)
def test_a_feature_that_differs_is_named(device: str, feature: str, tmp_path: Path) -> None:
    status, report = run_first(tmp_path, "--parts", "battery-small", device=device)
    assert status == 1
    named = {difference.split(": ")[1] for difference in report["differences"]}
    assert named == {feature, "all_exact", "accelerated"}


def test_parts_without_time_are_reported(tmp_path: Path) -> None:
    status, report = run_first(tmp_path, "--parts", "leak,rows", "--limit-s", "0", device="open_honest")
    assert status == 1
    assert {own["state"] for own in report["results"].values()} == {"out of time"}


def test_an_engine_starts_after_memory_of_the_last_is_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(torch.device("cpu"))
    model, engines = machine.load("small"), list[weakref.ref[OpenEngine]]()
    freed: list[list[OpenEngine | None]] = []
    monkeypatch.setattr(Machine, "free", lambda _: freed.append([engine() for engine in engines]))

    async def run() -> None:
        for _ in range(2):
            async with machine.engine(model) as engine:
                engines.append(weakref.ref(engine))
            del engine

    asyncio.run(run())
    assert freed == [[], [None]]


def test_the_tests_for_a_gpu_pass_on_a_stand_in() -> None:
    command = [sys.executable, "-m", "pytest", "-c", "tests/gpu/pytest.ini", "--confcutdir", "tests/gpu", "tests/gpu"]
    environment = os.environ | {"STABLE_AUDIO_TEST_DEVICE": "stand-in", "PYTEST_ADDOPTS": "-p no:cacheprovider"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
