"""The guard: a small process that outlives the launcher and cleans up after it, however the launcher ends.

The guard's standard input is a pipe from the launcher. The pipe closes when the launcher ends. Then the guard kills
every process that has a file open in the server's private folder, and removes the folder. This kills all processes of
Ray and HAProxy, because each has a log file open in the folder. The guard runs without site packages, so this module
imports only the standard library.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_KILL_TIMEOUT_S = 3.0


@contextmanager
def guarded(directory: Path) -> Iterator[None]:
    """Start a guard for `directory`. When the context or this process ends, the guard cleans up.

    It kills the processes that have a file open in `directory`, and removes `directory`.
    """
    command = [sys.executable, "-S", __file__, str(directory)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True):
        yield


def processes_using(directory: Path) -> list[int]:
    """Return the ids of the processes that have a file open in `directory`. Without /proc, the list is empty."""
    prefix = f"{directory}/"
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # the process ended, or belongs to another user
            for link in os.scandir(process / "fd"):
                with suppress(OSError):
                    if os.readlink(link.path).startswith(prefix):
                        found.add(int(process.name))
    return sorted(found)


def _clean_up(directory: Path, *, spared: set[int]) -> None:
    deadline = time.monotonic() + _KILL_TIMEOUT_S
    while directory.exists():  # a process that is just starting may create the folder again
        users = set(processes_using(directory)) - spared
        for pid in users:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        is_late = time.monotonic() >= deadline
        if not users or is_late:
            shutil.rmtree(directory, ignore_errors=True)
        if is_late:
            return
        time.sleep(0.02)


def _main() -> None:
    launcher = os.getppid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    with suppress(OSError):  # systemd-tmpfiles deletes old files in /tmp, but none below a locked folder
        fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
    sys.stdin.buffer.read()
    _clean_up(Path(sys.argv[1]), spared={launcher, os.getpid()})


if __name__ == "__main__":
    _main()
