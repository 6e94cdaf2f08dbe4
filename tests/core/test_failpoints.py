from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from stable_audio_serve.core.failpoints import VARIABLE, activate
from tests.patience import PATIENCE_S

_PROGRAM = """
from stable_audio_serve.core.failpoints import failpoint
failpoint("after_lease")
failpoint("mid_upload")
"""


def run(failpoints: str) -> int:
    return subprocess.run([sys.executable, "-c", _PROGRAM], env={VARIABLE: failpoints}, timeout=PATIENCE_S).returncode


@pytest.mark.server
@pytest.mark.parametrize(
    ("failpoints", "code"), [("", 0), ("after_commit=kill", 0), ("mid_upload=kill", -signal.SIGKILL)]
)
def test_a_process_exits_at_the_configured_failpoint(failpoints: str, code: int) -> None:
    assert run(failpoints) == code


@pytest.mark.server
def test_a_failpoint_with_a_file_fires_once(tmp_path: Path) -> None:
    markers = [tmp_path / name for name in ("a", "b")]
    failpoints = f"after_lease=kill@{markers[0]}, mid_upload=kill@{markers[1]}"
    assert [run(failpoints) for _ in range(3)] == [-signal.SIGKILL, -signal.SIGKILL, 0]
    assert [marker.exists() for marker in markers] == [True, True]


@pytest.mark.parametrize("text", ["nowhere=kill", "mid_upload", "mid_upload=explode"])
def test_an_invalid_failpoint_is_refused_at_once(text: str) -> None:
    with pytest.raises(ValueError, match=VARIABLE):
        activate(text)
