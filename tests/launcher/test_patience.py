"""The more programs want a machine's cores, the longer Ray's start may take."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from stable_audio_serve.launcher.patience import advice, crowding, start_limits
from tests.patience import PATIENCE_S, wait_until


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="there is no /proc")
def test_programs_that_want_to_run_are_noticed_at_once() -> None:
    cores = os.cpu_count() or 1
    loop = f"import time; end = time.monotonic() + {PATIENCE_S}\nwhile time.monotonic() < end: pass"
    programs = [subprocess.Popen([sys.executable, "-S", "-c", loop]) for _ in range(6 * cores)]
    try:
        wait_until(lambda: crowding() >= 5)
    finally:
        for program in programs:
            program.kill()
            program.wait()


def test_limits_grow_with_the_crowd_from_no_less_than_rays_own() -> None:
    worker, raylet = "RAY_worker_register_timeout_seconds", "RAY_raylet_start_wait_time_s"
    idle, crowded, hopeless = (start_limits(value) for value in (0.0, 20.0, 1e9))
    assert int(idle[worker]) >= 60
    assert int(crowded[worker]) == 20 * 60
    assert int(hopeless[worker]) <= 3600  # a start that fails comes to an end
    assert 30 < int(hopeless[raylet]) <= 60  # one that is late is dead
    assert set(idle) == set(crowded)
    assert all(int(crowded[name]) > int(idle[name]) for name in set(idle) - {raylet})


def test_the_advice_names_the_crowd_only_where_there_is_one() -> None:
    cores = os.cpu_count() or 1
    assert f"{20 * cores} programs want the {cores} cores" in advice(20.0)
    assert "programs" not in advice(1.0)
