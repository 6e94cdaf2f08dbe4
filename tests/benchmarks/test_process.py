"""A benchmark that is stopped while its server starts leaves none behind, whoever holds the event loop up."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.patience import PATIENCE_S, wait_until

pytestmark = pytest.mark.slow

_PROGRAM = """
import asyncio, signal, sys

signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore from the start
from benchmarks import cli
from benchmarks.servers import process

async def wait():
    # Begins a process of its own, never says that it is ready and does not mind Ctrl-C.
    sleeper = "import signal, subprocess, sys, time; signal.signal(2, signal.SIG_IGN)"
    sleeper += "; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(3600)']); time.sleep(3600)"
    process._STOP_TIMEOUT_S = 0.2
    print("begins", flush=True)
    with process._running(("-c", sleeper), port=1):
        pass

cli._run_case = lambda *args, **kwargs: asyncio.run(wait())
cli.main(["http", "--out", sys.argv[1]])
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_what_a_stopped_benchmark_began_ends_with_it(number: signal.Signals, tmp_path: Path) -> None:
    began = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, str(tmp_path)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert began.stdout is not None
    assert began.stdout.readline() == "begins\n"
    wait_until(lambda: len(psutil.Process(began.pid).children(recursive=True)) == 2)
    left = psutil.Process(began.pid).children(recursive=True)
    time.sleep(0.2)
    began.send_signal(number)
    assert began.wait(PATIENCE_S) == 130
    gone, alive = psutil.wait_procs(left, timeout=PATIENCE_S)
    assert not alive
    assert len(gone) == 2
