"""The wheel of the Python client works in an otherwise empty virtual environment, with a test server."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from tests.client.conftest import serve
from tests.docs.blocks import text_of
from tests.packaging.wheel import ROOT, build_wheel

pytestmark = [pytest.mark.server, pytest.mark.slow]

PROGRAM = """
import sys
from stable_audio_serve.client import Client

with Client(sys.argv[1]) as client:
    client.generate("rain", duration=0.5, seed=3).save("take.wav")
    job = client.jobs.wait(client.jobs.submit("rain", duration=0.5, seed=3).id)
    client.jobs.download(job, "job.wav")
"""


def run(*command: str | Path, folder: Path) -> str:
    done = subprocess.run([str(part) for part in command], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


async def test_client_wheel_generates_a_clip(tmp_path: Path) -> None:
    def install() -> Path:
        wheel = build_wheel(tmp_path, project="./packaging/client")
        python = tmp_path / "empty" / "bin" / "python"
        run(sys.executable, "-m", "venv", tmp_path / "empty", folder=tmp_path)
        run(python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", wheel, folder=tmp_path)
        return python

    python = await asyncio.to_thread(install)
    packages = await asyncio.to_thread(lambda: run(python, "-m", "pip", "list", "--format=freeze", folder=tmp_path))
    names = {line.partition("==")[0] for line in packages.splitlines()}
    assert {"stable-audio-serve-client", "httpx", "httpx-sse"} <= names
    assert not names & {"torch", "ray", "fastapi", "pydantic", "numpy"}
    async with serve() as served:
        await asyncio.to_thread(lambda: run(python, "-c", PROGRAM, served.url, folder=tmp_path))
        shown = text_of(ROOT / "packaging" / "client" / "README.md", "python")
        shown = shown.replace("http://localhost:8000", served.url)
        await asyncio.to_thread(lambda: run(python, "-c", shown, folder=tmp_path))
    assert (tmp_path / "rain.wav").exists()
    take, job = (tmp_path / "take.wav"), (tmp_path / "job.wav")
    assert await asyncio.to_thread(take.read_bytes) == await asyncio.to_thread(job.read_bytes) != b""
