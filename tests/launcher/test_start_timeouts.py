"""The timeouts that the launcher sets for Ray's start are longer on a busy machine."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from stable_audio_serve.launcher.start_timeouts import load_per_core, start_advice, start_timeouts
from tests.patience import PATIENCE_S, wait_until


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="there is no /proc")
def test_load_counts_runnable_programs_immediately() -> None:
    cores = os.cpu_count() or 1
    loop = f"import time; end = time.monotonic() + {PATIENCE_S}\nwhile time.monotonic() < end: pass"
    command = ["nice", "-n", "19", sys.executable, "-S", "-c", loop]  # so that other tests go on at their speed
    programs = [subprocess.Popen(command) for _ in range(6 * cores)]
    try:
        wait_until(lambda: load_per_core() >= 5)
    finally:
        for program in programs:
            program.kill()
            program.wait()


def test_timeouts_grow_with_load_and_never_shrink_rays_own() -> None:
    worker, raylet = "RAY_worker_register_timeout_seconds", "RAY_raylet_start_wait_time_s"
    idle, busy, overloaded = (start_timeouts(value) for value in (0.0, 20.0, 1e9))
    assert int(idle[worker]) >= 60
    assert int(busy[worker]) == 20 * 60
    assert int(overloaded[worker]) <= 3600  # a start that never succeeds must fail at some time
    assert 30 < int(overloaded[raylet]) <= 60  # even under load, Ray's node process (raylet) starts fast or not at all
    assert set(idle) == set(busy)
    assert all(int(busy[name]) > int(idle[name]) for name in set(idle) - {raylet})


def test_advice_mentions_the_load_only_when_it_is_high() -> None:
    cores = os.cpu_count() or 1
    assert f"{20 * cores} programs compete for the {cores} cores" in start_advice(20.0)
    assert "programs" not in start_advice(1.0)
