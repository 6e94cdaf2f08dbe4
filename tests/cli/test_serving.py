"""If the configuration has a faulty value, `serve` names the value and does not start."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from stable_audio_serve.cli import app
from tests.patience import PATIENCE_S
from tests.serving.conftest import TINY
from tests.serving.launched import command, free_port, write_config

_TINY = {"models": [{"name": "tiny", "path": TINY}]}


@pytest.mark.parametrize(
    ("args", "variables", "named"),
    [
        ({"modles": []}, {}, "modles"),
        ({"models": [{"name": "unheard-of"}]}, {}, "unheard-of"),
        (_TINY, {"STABLE_AUDIO_API_KEY_FILE": "/no/such/keys"}, "/no/such/keys"),
        (_TINY, {"STABLE_AUDIO_MAX_STEPS": "many"}, "STABLE_AUDIO_MAX_STEPS"),
        (_TINY, {"STABLE_AUDIO_DEFAULT_MODEL": "medium"}, "STABLE_AUDIO_DEFAULT_MODEL"),
    ],
)
def test_a_config_fault_is_named_and_stops_startup(
    tmp_path: Path, args: dict[str, Any], variables: dict[str, str], named: str
) -> None:
    config = write_config(tmp_path, args)
    result = CliRunner().invoke(app, ["serve", "--config", str(config), "--port", str(free_port())], env=variables)
    assert result.exit_code == 2
    (error,) = (line for line in result.stderr.splitlines() if line.startswith("error: "))
    assert named in error


def test_a_start_does_not_fail_because_its_output_is_lost(tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        command_line = command(write_config(tmp_path, {"modles": []}))
        done = subprocess.run(command_line, stdout=full, stderr=full, timeout=PATIENCE_S, check=False)
    assert done.returncode == 2  # because of the configuration
