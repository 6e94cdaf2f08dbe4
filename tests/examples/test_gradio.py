"""The example with a Gradio page works with a test server, in an environment with only the example's requirements."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

import httpx
import pytest
import soundfile

from tests.api.compat.serving import serve_app
from tests.examples.programs import EXAMPLES, ROOT, Programs, finish
from tests.patience import PATIENCE_S
from tests.serving.launched import free_port

pytestmark = [pytest.mark.server, pytest.mark.slow]


def skip_or_fail(reason: str) -> None:
    """Skip the test. In CI, where every test must run, fail instead."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(f"NOT TESTED, the Gradio page: {reason}")


@pytest.fixture(scope="module")
def python() -> Path:
    """Returns the path of Python in an environment with Gradio and the dependencies of this project's client.

    The first run installs the environment in the user's cache.
    """
    client = tomllib.loads((ROOT / "packaging" / "client" / "pyproject.toml").read_text())
    wanted = (EXAMPLES / "gradio_requirements.txt").read_text().split() + client["project"]["dependencies"]
    digest = hashlib.sha256(repr((wanted, sys.version_info[:2])).encode()).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stable-audio-serve-tests"
    installed = cache / f"gradio-{digest}"
    if not installed.exists():
        cache.mkdir(parents=True, exist_ok=True)
        folder = tempfile.mkdtemp(dir=cache)
        venv = (sys.executable, "-m", "venv", folder)
        pip = (f"{folder}/bin/python", "-m", "pip", "--disable-pip-version-check", "install", "--quiet", *wanted)
        for command in (venv, pip):
            done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
            if done.returncode:
                shutil.rmtree(folder)
                skip_or_fail(f"it could not be installed: {done.stderr[-500:]}")
        Path(folder).rename(installed)  # atomic, so that no other test run sees an incomplete environment
    return installed / "bin" / "python"


async def ask(http: httpx.AsyncClient, data: list[object]) -> tuple[str, object]:
    """Call the Gradio page's function over HTTP. Returns the kind and the data of the last event."""
    call = (await http.post("/gradio_api/call/generate", json={"data": data})).json()["event_id"]
    events = (await http.get(f"/gradio_api/call/generate/{call}")).text.strip().split("\n\n")
    kind, _, content = events[-1].partition("\n")
    return kind.removeprefix("event: "), json.loads(content.removeprefix("data: "))


async def until_it_answers(http: httpx.AsyncClient, process: asyncio.subprocess.Process) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                await http.get("/gradio_api/info")
            except httpx.TransportError:
                assert process.returncode is None
                await asyncio.sleep(0.1)
            else:
                return


def test_help_starts_no_page(python: Path) -> None:
    command = (str(python), str(EXAMPLES / "gradio_app.py"), "--help")
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=True, env=environ)
    assert done.stdout.startswith("usage: gradio_app.py")


async def test_the_gradio_page_generates_audio(python: Path, tmp_path: Path) -> None:
    port = free_port()
    async with serve_app() as (server_port, backend):
        programs = Programs(tmp_path, f"http://127.0.0.1:{server_port}", python=str(python))
        process = await programs.start("gradio_app.py", GRADIO_SERVER_PORT=str(port), GRADIO_ANALYTICS_ENABLED="False")
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_S) as http:
            await until_it_answers(http, process)
            kind, data = await ask(http, ["rain", 0.5, 7, None, 0.7])
            assert kind == "complete"
            assert isinstance(data, list)
            clip, seed = data
            assert seed == 7
            assert soundfile.info(io.BytesIO((await http.get(clip["url"])).content)).duration == 0.5
            source = {"path": clip["path"], "meta": {"_type": "gradio.FileData"}}
            assert (await ask(http, ["hail", 0.5, 7, source, 0.25]))[0] == "complete"
            assert backend.last.init_noise_level == 0.25
            assert (await ask(http, ["", 0.5, 7, None, 0.7]))[0] == "error"
        process.send_signal(signal.SIGINT)
        await finish(process, 0)
