"""If the configuration has a faulty value, `serve` names the value and does not start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from stable_audio_serve.cli import app
from tests.serving.conftest import TINY
from tests.serving.launched import free_port, write_config

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
