"""Jobs of a server that is killed, rescaled and restarted."""

from __future__ import annotations

import csv
import io
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from stable_audio_serve.jobs.runner.attempt import RunnerPauses
from tests.audio_files import make_audio_file
from tests.patience import PATIENCE_S, wait_until
from tests.served.conftest import OVER, make_body, submit, wait
from tests.serving.conftest import model
from tests.serving.launched import LaunchedServer, write_config

pytestmark = [pytest.mark.server, pytest.mark.slow]


def make_long_body(**overrides: Any) -> dict[str, Any]:
    """Return the body of a request that takes the tiny model one to two seconds."""
    return make_body(steps=150, duration=4) | overrides


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("jobs")
    args = {
        "models": [model("tiny", max_queue_s=1e6)],
        "jobs": {"runners": 2, "max_running": 2, "lease_s": 3.0},
        "ingress": {"replicas": 2},
        "drain_s": PATIENCE_S,  # so long that a test would fail if stopping the server took this time
    }
    return write_config(folder, args)


def launch(config: Path, *options: str) -> LaunchedServer:
    environment = {"STABLE_AUDIO_MAX_STEPS": "1000", "STABLE_AUDIO_MAX_DURATION": "20"}
    return LaunchedServer(config, *options, environment=environment).wait_until_ready()


@pytest.fixture(scope="module")
def server(config: Path) -> Iterator[LaunchedServer]:
    launched = launch(config)
    yield launched
    if launched.process.poll() is None:
        launched.stop()


def test_submission_wakes_the_runner(server: LaunchedServer) -> None:
    """A runner without work polls every three seconds, but a submitted job makes it poll at once."""
    time.sleep(5)  # after this time without work, the runner polls at its longest interval
    job = wait(server, submit(server, make_body()))
    waited = datetime.fromisoformat(job["started_at"]) - datetime.fromisoformat(job["created_at"])
    assert waited.total_seconds() < RunnerPauses().last_poll_s / 2


def test_new_processes_refuse_moved_stores(server: LaunchedServer, config: Path) -> None:
    """If a new process created an empty database at the old path, some requests would use it."""
    outputs, away = config.parent / "outputs", config.parent / "away"
    done = wait(server, submit(server, make_body()))
    outputs.rename(away)
    try:
        killed = {server.pids("ServeReplica:audio:Ingress")[0], *server.pids("job-runner")}
        for pid in killed:
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: len(server.pids("job-runner")) == 2 and not killed & {*server.pids("ServeReplica")})
        deadline = time.monotonic() + 5.0
        while time.monotonic() < deadline:  # some of the requests reach the new processes
            for reply in (server.client.get(f"/jobs/{done['id']}"), server.client.post("/jobs", json=make_body())):
                assert reply.status_code == 503, reply.text
                assert int(reply.headers["retry-after"]) >= 1
        assert server.client.get("/health").json()["job_store"]["state"] == "moved"
        assert server.client.get("/ready").status_code == 200
        assert server.client.post("/generate", json=make_body()).status_code == 200
        assert not outputs.exists()
    finally:
        away.rename(outputs)
    assert wait(server, done["id"]) == done
    assert wait(server, submit(server, make_body()))["status"] == "succeeded"
    wait_until(lambda: server.client.get("/health").json()["job_store"]["state"] == "ok")


def num_balanced(server: LaunchedServer) -> int:
    """Return the number of ingress replicas to which HAProxy sends requests."""
    (path,) = server.directory.glob("*/admin.sock")
    with socket.socket(socket.AF_UNIX) as admin:
        admin.connect(str(path))
        admin.sendall(b"show stat -1 4 -1\n")  # all servers
        table = admin.makefile().read().removeprefix("# ")
    rows = csv.DictReader(io.StringIO(table.strip()))
    return sum(row["status"] == "UP" and "-Ingress-" in row["svname"] for row in rows)


def test_replaced_ingress_closes_its_event_streams(server: LaunchedServer) -> None:
    """If a stopping replica left its event streams open, Ray Serve would wait up to two minutes for them."""
    minutes = make_long_body(steps=1000, duration=16, batch_size=4, cfg_scale=3, sampler_kwargs={"sampler_type": "rk4"})
    job_id = submit(server, minutes)
    wait_until(lambda: num_balanced(server) == 2)
    opened = threading.Semaphore(0)

    def read_events() -> str:
        with server.client.stream("GET", f"/jobs/{job_id}/events") as response:
            opened.release()
            return response.read().decode()

    with ThreadPoolExecutor(4) as pool:
        streams = [pool.submit(read_events) for _ in range(4)]  # some for each HTTP process
        try:
            assert all(opened.acquire(timeout=PATIENCE_S) for _ in streams)
            assert not any(stream.done() for stream in streams)
            with server.look_inside("tests.serving.rescale", "Ingress", "1") as rescaling:
                assert rescaling.wait(PATIENCE_S) == 0
            wait_until(lambda: len(server.pids("ServeReplica:audio:Ingress")) == 1)
            wait_until(lambda: sum(stream.done() for stream in streams) == 2)
            ended = [stream for stream in streams if stream.done()]
            for stream in ended:
                assert stream.result().rstrip().splitlines()[-1].startswith("retry: ")
        finally:
            assert server.client.delete(f"/jobs/{job_id}").status_code == 202
        assert all("event: end" in stream.result() for stream in streams if stream not in ended)


def test_accepted_jobs_survive_the_death_of_all_processes(server: LaunchedServer, config: Path) -> None:
    """All processes are killed while some jobs run and others wait. One of the jobs has an upload.

    A new server must finish all jobs.
    """
    finished = wait(server, submit(server, make_body()))
    bodies = [make_long_body(seed=seed) for seed in range(3)]
    job_ids = [submit(server, body) for body in bodies]
    wait(server, job_ids[0], "running", *OVER)
    upload = {"audio": ("a.wav", make_audio_file(duration_s=1.0))}
    form = {"prompt": "x", "duration": "2", "steps": "2"}
    job_ids.append(server.client.post("/jobs/variations", data=form, files=upload).json()["id"])
    server.stop(number=signal.SIGKILL)

    again = launch(config)
    try:
        jobs = [wait(again, job_id) for job_id in job_ids]
        assert [job["status"] for job in jobs] == ["succeeded"] * 4
        expected = again.client.post("/v1/audio/generations", json=bodies[2]).content
        assert again.client.get(jobs[2]["download_url"]).content == expected
        kept = again.client.get(f"/jobs/{finished['id']}").json()
        assert (kept["status"], kept["completed_at"]) == ("succeeded", finished["completed_at"])
        wait_until(lambda: list((config.parent / "outputs" / "uploads").iterdir()) == [])
        check_that_a_second_signal_stops_at_once(again)
    finally:
        if again.process.poll() is None:
            again.stop()


def check_that_a_second_signal_stops_at_once(server: LaunchedServer) -> None:
    with ThreadPoolExecutor(1) as pool:
        minutes = make_long_body(
            steps=1000, duration=16, batch_size=4, cfg_scale=3, sampler_kwargs={"sampler_type": "rk4"}
        )
        busy = pool.submit(server.client.post, "/generate", json=minutes)
        wait_until(lambda: server.num_requests("tiny") == 1)
        server.signal(signal.SIGTERM)
        time.sleep(1.5)  # signals in quick succession would count as one
        assert server.process.poll() is None
        assert server.start_s is not None
        # The limit is relative to the time of the start, because on a slow machine both take longer.
        assert server.stop(number=signal.SIGTERM) < server.start_s / 2
        assert isinstance(busy.exception(), httpx.TransportError)
    wait_until(lambda: not server.leftovers())
    assert not server.directory.exists()
