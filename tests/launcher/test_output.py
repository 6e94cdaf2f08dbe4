"""What the server prints may be lost: its disk is full, or the terminal or pipe is closed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.patience import PATIENCE_S

_PRINT = """
import faulthandler, os, sys
from stable_audio_serve.launcher.output import tolerate_lost_output

tolerate_lost_output()
for _ in range(1000):
    print("a line of the server's log")
    print("a line of the server's log", file=sys.stderr, flush=True)
faulthandler.enable()  # Ray calls this; it needs standard error
assert {os.get_inheritable(number) for number in (0, 1, 2)} == {True}
open(sys.argv[1], "x").close()
"""


@pytest.mark.parametrize(
    "redirection", ["", "> /dev/full 2>&1", "2>&1 | head -1", "2>&-", "<&- >&- 2>&-"], ids=lambda text: text or "none"
)
def test_a_process_whose_output_is_lost_runs_on(tmp_path: Path, redirection: str) -> None:
    command = f'set -o pipefail; "$0" -c "$1" "$2" {redirection}'
    subprocess.run(
        ["bash", "-c", command, sys.executable, _PRINT, tmp_path / "end"],
        capture_output=True,
        timeout=PATIENCE_S,
        check=True,
    )
    assert (tmp_path / "end").exists()


def test_output_that_can_be_written_is_complete(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _PRINT, tmp_path / "end"], capture_output=True, timeout=PATIENCE_S, check=True
    )
    assert done.stdout == done.stderr == b"a line of the server's log\n" * 1000
