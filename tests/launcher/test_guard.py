"""The guard process kills the launcher's children and removes the launcher's folder, however the launcher ends."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from stable_audio_serve.launcher.guard import guarded, processes_using
from tests.patience import PATIENCE_S, wait_until

pytestmark = pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc")

_LEAVE_A_CHILD = """
import os, subprocess, sys
from pathlib import Path
from stable_audio_serve.launcher.guard import guarded
directory = Path(sys.argv[1])
with guarded(directory):
    log = open(directory / "log", "w")
    print(subprocess.Popen(["sleep", "3600"], stdout=log, start_new_session=True).pid, flush=True)
    os.kill(os.getpid(), 9)
"""


def test_processes_using_the_folder_end_with_the_context(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    directory.mkdir()
    with guarded(directory), (directory / "log").open("w") as log:
        child = subprocess.Popen(["sleep", "3600"], stdout=log)
        wait_until(lambda: child.pid in processes_using(directory))
    assert child.wait(timeout=PATIENCE_S) == -9
    assert not directory.exists()


def test_folder_is_locked_against_cleaners_of_tmp(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    directory.mkdir()

    def is_locked() -> bool:
        cleaner = os.open(directory, os.O_RDONLY)
        try:
            fcntl.flock(cleaner, fcntl.LOCK_SH | fcntl.LOCK_NB)  # as systemd-tmpfiles does
        except BlockingIOError:
            return True
        finally:
            os.close(cleaner)
        return False

    with guarded(directory):
        wait_until(is_locked)


def test_processes_elsewhere_are_left_alone(tmp_path: Path) -> None:
    directory, elsewhere = tmp_path / "run", tmp_path / "run-2"
    directory.mkdir()
    with elsewhere.open("w") as log, subprocess.Popen(["sleep", "3600"], stdout=log) as other:
        with guarded(directory):
            pass
        assert other.poll() is None
        other.kill()


def test_a_killed_launcher_leaves_nothing(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    directory.mkdir()
    launcher = subprocess.run(
        [sys.executable, "-c", _LEAVE_A_CHILD, str(directory)], stdout=subprocess.PIPE, text=True, check=False
    )
    assert launcher.returncode == -9
    assert int(launcher.stdout) > 0
    wait_until(lambda: not directory.exists())
    assert processes_using(directory) == []
