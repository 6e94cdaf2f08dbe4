"""The text printed when the server is ready has a command that works with the server's settings."""

from __future__ import annotations

from typing import Any

import pytest

from stable_audio_serve.core.keys import hash_key
from stable_audio_serve.core.settings import Settings
from stable_audio_serve.launcher.launch import _ready_text
from stable_audio_serve.serving.placement import plan_deployments


@pytest.mark.parametrize(
    ("api", "needs_key"),
    [({}, False), ({"key_file": "keys.txt"}, True), ({"key_hashes": [hash_key("secret")]}, True)],
)
def test_the_command_sends_a_key_if_the_server_needs_one(api: dict[str, Any], *, needs_key: bool) -> None:
    plan = plan_deployments(Settings.model_validate({"api": api}))
    # In double quotes, so that the shell replaces $KEY.
    assert ('-H "Authorization: Bearer $KEY"' in _ready_text("http://127.0.0.1:8000", plan)) == needs_key
