"""A tiny process that outlives the launcher to leave nothing behind, however the launcher ends.

Its standard input is a pipe from the launcher, so the end of that pipe is the end of the launcher: then every process
with a file open below the server's private folder (all of Ray's logs and HAProxy's are there) is killed, and the
folder removed. Standard library only.
"""

from __future__ import annotations

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
    """Remove `directory` and end the processes that use it when the context, or this process, ends."""
    command = [sys.executable, "-S", __file__, str(directory)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True):
        yield


def users_of(directory: Path) -> list[int]:
    """Returns the ids of processes with a file open below `directory`; none where there is no /proc."""
    prefix = f"{directory}/"
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # gone meanwhile, or not ours to look at
            for link in os.scandir(process / "fd"):
                with suppress(OSError):
                    if os.readlink(link.path).startswith(prefix):
                        found.add(int(process.name))
    return sorted(found)


def _clean_up(directory: Path, *, spared: set[int]) -> None:
    deadline = time.monotonic() + _KILL_TIMEOUT_S
    while (users := set(users_of(directory)) - spared) and time.monotonic() < deadline:
        for pid in users:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    shutil.rmtree(directory, ignore_errors=True)


def _main() -> None:
    launcher = os.getppid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.buffer.read()
    _clean_up(Path(sys.argv[1]), spared={launcher, os.getpid()})


if __name__ == "__main__":
    _main()
