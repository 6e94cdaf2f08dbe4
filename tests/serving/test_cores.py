"""How many threads each model computes with, and how models share the machine's cores."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from stable_audio_serve.core.settings import ModelSettings, Settings
from stable_audio_serve.serving import cores
from stable_audio_serve.serving.cores import choose_threads, share_cores, usable_cores

SFX: dict[str, Any] = {"name": "small-sfx"}
MUSIC: dict[str, Any] = {"name": "small-music"}
DEMO: dict[str, Any] = {"name": "demo"}


@pytest.mark.parametrize(
    ("num_cores", "num_replicas", "expected"),
    [(1, 1, 1), (2, 1, 2), (3, 1, 3), (4, 1, 3), (8, 1, 7), (8, 2, 3), (16, 4, 3), (2, 5, 1), (64, 1, 63)],
)
def test_cores_are_shared_and_one_of_four_stays_free(num_cores: int, num_replicas: int, expected: int) -> None:
    assert share_cores(num_cores, num_replicas=num_replicas) == expected


def threads(*models: dict[str, Any], device: str = "cpu", cluster_gpus: float = 0, **settings: Any) -> list[int]:
    parsed = Settings.model_validate({"models": models, **settings})
    return [choose_threads(parsed, model, device=device, cluster_gpus=cluster_gpus) for model in parsed.models]


def test_every_cpu_replica_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "usable_cores", lambda: 9)
    assert threads(SFX) == [8]
    assert threads(SFX, MUSIC | {"replicas": {"max_replicas": 3}}) == [2, 2]
    assert threads(SFX, DEMO) == [4, 1]
    assert threads(SFX | {"threads": 5}, MUSIC, DEMO | {"threads": 2}) == [5, 2, 2]


def test_gpu_models_take_no_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "usable_cores", lambda: 9)
    assert threads(SFX, device="cuda", cluster_gpus=1) == [1]
    on_cpu = SFX | {"device": "cpu"}
    assert threads(on_cpu, MUSIC, cluster_gpus=1)[0] == 8
    assert threads(on_cpu, MUSIC, cluster_gpus=0)[0] == 4
    without_gpu = [SFX | {"num_gpus": 0}, MUSIC | {"num_gpus": 0}]
    assert threads(*without_gpu, cluster_gpus=1) == [4, 4]


def make_root(folder: Path, groups: str, files: dict[str, str]) -> Path:
    for name, text in ({"proc/self/cgroup": groups} | files).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1),
        ("0::/a/b\n", {"sys/fs/cgroup/a/cpu.max": "300000 100000", "sys/fs/cgroup/a/b/cpu.max": "max 100000"}, 3),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "10000 100000"}, 1),
        (
            "4:memory:/x\n3:cpuset:/\n2:cpu,cpuacct:/docker/1\n0::/\n",
            {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000\n", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"},
            2,
        ),
        ("1:cpu:/\n", {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "1000"}, 6),
        (
            "2:memory:/a\n1:cpu:/\n",
            {"sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "1000", "sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "1000"},
            6,
        ),
        ("0::/\n", {}, 6),
    ],
)
def test_cgroup_quota_limits_the_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, groups: str, files: dict[str, str], expected: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    assert usable_cores(make_root(tmp_path, groups, files)) == expected


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="affinity is Linux's")
def test_cpu_affinity_limits_the_cores() -> None:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert usable_cores() == 1
    finally:
        os.sched_setaffinity(0, before)


def test_machine_without_cgroups_uses_all_cores(tmp_path: Path) -> None:
    assert usable_cores(tmp_path) == len(os.sched_getaffinity(0))


def test_demo_model_uses_one_thread() -> None:
    (model,) = Settings(models=(ModelSettings(name="demo"),)).models
    assert choose_threads(Settings(models=(model,)), model, device="cpu", cluster_gpus=0) == 1
