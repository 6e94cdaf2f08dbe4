"""The unmodified clients of ElevenLabs, for Python and for JavaScript, with a real server."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from stable_audio_serve.core.keys import hash_key
from tests.api.compat.client_scripts import run_script
from tests.api.compat.serving import serve_app
from tests.packages import install_npm, install_python

PYTHON_CLIENT, NODE_CLIENT = "elevenlabs==2.78.0", "@elevenlabs/elevenlabs-js@2.73.0"
SCRIPTS = Path(__file__).parent / "clients"
KEY = "the-key"
pytestmark = pytest.mark.server


@pytest_asyncio.fixture(
    scope="module", loop_scope="module", params=["python", pytest.param("node", marks=pytest.mark.slow)]
)
async def results(request: pytest.FixtureRequest) -> AsyncIterator[dict[str, Any]]:
    """Run a client once against a server, and return its results."""
    environment = dict(os.environ)
    if request.param == "python":
        environment["PYTHONPATH"] = str(install_python(PYTHON_CLIENT))
        command = (sys.executable, str(SCRIPTS / "elevenlabs_python.py"))
    else:
        environment["NODE_PATH"] = str(install_npm(NODE_CLIENT))
        command = ("node", str(SCRIPTS / "elevenlabs_node.cjs"))
    async with serve_app(api={"key_hashes": [f"studio:{hash_key(KEY)}"]}) as (port, _):
        yield await run_script(*command, f"http://127.0.0.1:{port}", KEY, environment=environment)


def test_sounds_have_their_format(results: dict[str, Any]) -> None:
    assert results["sound"]["plain"]["size"] * 8 / 1000 == pytest.approx(128, rel=0.1)
    assert results["sound"]["full"]["size"] == 4 * 24_000


def test_music_is_the_same_whole_and_streamed(results: dict[str, Any]) -> None:
    music = results["music"]
    assert music["whole"]["size"] in (4 * 72_000, 44 + 4 * 72_000)  # WAV has a header, PCM none
    assert music["streamed"]["sha256"] == music["whole"]["sha256"]
    assert music["planned"]["size"] == 6 * 8000


def test_asynchronous_client_gets_audio(results: dict[str, Any]) -> None:
    if "asynchronous" in results:  # of the Python client
        assert results["asynchronous"]["size"] * 8 / 1000 == pytest.approx(64, rel=0.15)


def test_clients_read_user_and_models(results: dict[str, Any]) -> None:
    account = results["account"]
    assert (account["tier"], account["limit"]) == ("self-hosted", 1_000_000)
    assert account["user"]
    assert account["models"] == ["small-sfx", "small-music", "medium", "demo"]


def test_errors_are_those_of_the_clients(results: dict[str, Any]) -> None:
    errors = results["errors"]
    for name, field in (("long", "duration_seconds"), ("finetune", "finetune_id"), ("format", "output_format")):
        if error := errors.get(name):  # the JavaScript client sends no unknown format
            assert (error["name"], error["status"]) == ("UnprocessableEntityError", 422)
            assert error["body"]["detail"][0]["loc"][-1] == field
    for name in ("key", "sound key"):
        assert errors[name]["status"] == 401
        assert errors[name]["body"]["detail"]["status"] == "invalid_api_key"
