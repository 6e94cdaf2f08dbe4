"""Stop signals of the launcher, each in a process of its own."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from stable_audio_serve.launcher.embedded import hangups_blocked
from tests.patience import PATIENCE_S

_START = """
import os, signal, threading
from stable_audio_serve.launcher.signals import StopSignals

stop = StopSignals()
stop.listen()

def send(number):
    os.kill(os.getpid(), number)

class Fork:
    # Python prints an exception of a handler that runs in `__del__`, as it does in the hooks of a fork.
    def __del__(self):
        send(signal.SIGTERM)
        sum(range(1000))

def replace_handler():
    signal.signal(signal.SIGTERM, lambda *_: None)
    send(signal.SIGTERM)
"""


def run(script: str) -> str:
    """Returns the output of a process that runs `script` and then says whether `wait` stopped it."""
    tail = "except KeyboardInterrupt:\n    print('stopped')\nelse:\n    print('waited')\n"
    done = subprocess.run(
        [sys.executable, "-c", f"{_START}\ntry:\n    {script}\n{tail}"],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=True,
    )
    return done.stdout


@pytest.mark.parametrize(
    "script",
    [
        "send(signal.SIGTERM); print('not reached')",
        "Fork(); stop.wait(0)",
        "replace_handler(); stop.wait(0)",
        "threading.Timer(0.2, send, (signal.SIGHUP,)).start(); stop.wait()",
    ],
    ids=["raised", "lost in a fork", "handler replaced", "later"],
)
def test_a_stop_signal_is_never_lost(script: str) -> None:
    assert run(script) == "stopped\n"


@pytest.mark.parametrize(
    ("later_s", "exit_code"),
    [(2.0, 3), (0.5, 0)],
    ids=["second Ctrl-C", "Ctrl-C that a program such as make passes on"],
)
def test_second_signal_stops_at_once_unless_it_is_a_repeat(later_s: float, exit_code: int) -> None:
    script = f"""
try:
    send(signal.SIGINT)
except KeyboardInterrupt:
    stop.begin_stop(exit_code=3)
    stopping_at = time.monotonic()
    time.monotonic = lambda: stopping_at + {later_s}
    send(signal.SIGINT)
"""
    ended = subprocess.run([sys.executable, "-c", f"import time\n{_START}{script}"], timeout=PATIENCE_S, check=False)
    assert ended.returncode == exit_code


def test_other_signals_do_not_stop_the_server() -> None:
    handler = "signal.signal(signal.SIGUSR1, lambda *_: None)"
    assert run(f"{handler}; send(signal.SIGUSR1); stop.wait(0.1)") == "waited\n"


def test_a_closed_terminal_ends_no_process_of_ray() -> None:
    blocked = "import signal; print(signal.SIGHUP in signal.pthread_sigmask(signal.SIG_BLOCK, ()))"
    with hangups_blocked():
        assert subprocess.check_output([sys.executable, "-c", blocked], text=True) == "True\n"
    assert signal.SIGHUP not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
