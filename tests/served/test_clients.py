"""The command line and the Python client with a real server."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from stable_audio_serve.client import Client, Job
from tests.patience import PATIENCE_S, wait_until
from tests.serving.launched import LaunchedServer

pytestmark = pytest.mark.server


def _restore_sigint() -> None:
    """Make Ctrl-C work in a child process. If a shell runs the tests in the background, children ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def start(server: LaunchedServer, folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "stable_audio_serve.cli", *arguments],
        cwd=folder,
        env=os.environ | {"STABLE_AUDIO_URL": server.url, "PYTHONPATH": os.getcwd()},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=_restore_sigint,
    )


def find_running(client: Client) -> Job:
    job, *_ = wait_until(lambda: client.jobs.list(status="running").jobs)
    return job


def test_command_call_and_job_make_the_same_file(server: LaunchedServer, tmp_path: Path) -> None:
    process = start(server, tmp_path, "generate", "a door closes", "-d", "1", "-s", "7", "--steps", "1")
    output, errors = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, output) == (0, "a-door-closes-7.wav\n"), errors
    with Client(server.url) as client:
        take = client.generate("a door closes", duration=1, seed=7, steps=1)
        job = client.jobs.submit("a door closes", duration=1, seed=7, steps=1)
        path = client.jobs.download(client.jobs.wait(job.id, timeout_s=PATIENCE_S), tmp_path / "job.wav")
    assert (tmp_path / "a-door-closes-7.wav").read_bytes() == take.content == path.read_bytes()


def test_ctrl_c_cancels_the_job_on_the_server(server: LaunchedServer, tmp_path: Path) -> None:
    long = ("-d", "16", "--steps", "1000", "-n", "4", "--cfg-scale", "3", "--sampler", "rk4")
    process = start(server, tmp_path, "generate", "a door closes", *long)
    with Client(server.url) as client:
        job = find_running(client)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=PATIENCE_S)
        # If the server is slow to answer, another line is before the error.
        lines = [line for line in errors.splitlines() if not line.startswith("waiting for the server ")]
        assert (process.returncode, lines) == (130, ["error: interrupted"])
        assert client.jobs.wait(job.id, timeout_s=PATIENCE_S).status == "cancelled"
    assert list(tmp_path.iterdir()) == []
