"""Durable jobs on the whole stack: one server of their own, because it is killed and started again."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from stable_audio_serve.cli.metrics_page import exported_name
from stable_audio_serve.core.metrics import METRICS
from stable_audio_serve.jobs.runner.pauses import RunnerPauses
from tests.audio_files import make_audio_file
from tests.patience import PATIENCE_S, wait_until
from tests.serving.conftest import model
from tests.serving.launched import LaunchedServer, Watcher, free_port, write_config

pytestmark = pytest.mark.ray

_RAY_LABELS = {
    "Component",
    "NodeAddress",
    "SessionName",
    "Version",
    "WorkerId",
    "otel_scope_name",
    "otel_scope_schema_url",
    "otel_scope_version",
}
_FAST_METRICS = {"RAY_metrics_report_interval_ms": "1000"}
_OVER = ("succeeded", "failed")


def make_body(**overrides: Any) -> dict[str, Any]:
    return {"prompt": "rain on a tin roof", "duration": 2, "seed": 1, "steps": 2} | overrides


def make_long_body(**overrides: Any) -> dict[str, Any]:
    """A second or two of work for the tiny model."""
    return make_body(steps=150, duration=4) | overrides


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("jobs")
    args = {
        "models": [model("tiny", max_queue_s=1e6)],
        "jobs": {"webhook_allow_hosts": ["127.0.0.1"], "runners": 2, "max_running": 2, "lease_s": 3.0},
        "ingress": {"replicas": 2},
        "drain_s": PATIENCE_S,  # a stop that waits for it is told from one that does not
    }
    return write_config(folder, args)


def launch(config: Path, *options: str) -> LaunchedServer:
    environment = {"STABLE_AUDIO_MAX_STEPS": "1000", "STABLE_AUDIO_MAX_DURATION": "20"}
    return LaunchedServer(config, *options, environment=environment | _FAST_METRICS).wait_until_ready()


@pytest.fixture(scope="module")
def metrics_port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def server(config: Path, metrics_port: int) -> Iterator[LaunchedServer]:
    launched = launch(config, "--metrics-port", str(metrics_port))
    yield launched
    if launched.process.poll() is None:
        launched.stop()


def submit(server: LaunchedServer, **fields: Any) -> str:
    reply = server.client.post("/jobs", json=make_body(**fields))
    assert reply.status_code == 202, reply.text
    job_id: str = reply.json()["id"]
    return job_id


def wait(server: LaunchedServer, job_id: str, *words: str) -> dict[str, Any]:
    """The job once its status is one of `words`; without any, once it is over."""

    def there() -> dict[str, Any]:
        job: dict[str, Any] = server.client.get(f"/jobs/{job_id}").json()
        return job if job["status"] in (words or _OVER) else {}

    return wait_until(there)


def test_a_job_runs_and_its_file_lies_below_the_folder_of_the_start(server: LaunchedServer, config: Path) -> None:
    job = wait(server, submit(server))
    assert job["status"] == "succeeded", job
    assert job["download_url"] == f"{server.url}/jobs/{job['id']}/audio"
    audio = server.client.get(job["download_url"]).content
    assert audio == server.client.post("/generate", json=make_body(model="tiny")).content
    assert (config.parent / "outputs" / f"{job['id']}-stable-audio-3-tiny.wav").read_bytes() == audio
    assert (config.parent / "outputs" / "jobs.db").is_file()


def test_the_runner_is_woken_by_a_submission(server: LaunchedServer) -> None:
    """A runner that sleeps looks again after three seconds at the latest; one that is woken, at once."""
    time.sleep(5)  # time alone makes it fall asleep
    job = wait(server, submit(server))
    waited = datetime.fromisoformat(job["started_at"]) - datetime.fromisoformat(job["created_at"])
    assert waited.total_seconds() < RunnerPauses().last_poll_s / 2


def test_cancel_reaches_the_engine_and_the_webhook(server: LaunchedServer) -> None:
    with Receiver() as receiver:
        path = f"/queue/fal-ai/stable-audio?fal_webhook={receiver.url}"
        watcher = Watcher(server, "tiny")
        try:
            before = watcher.status()
            ticket = server.client.post(path, json={"prompt": "x", "seconds_total": 16, "steps": 1000}).json()
            wait_until(lambda: watcher.status()["in_flight"] == 1)
            assert server.client.put(ticket["cancel_url"]).status_code == 202
            wait_until(lambda: watcher.status()["in_flight"] == 0)
            after = watcher.status()
            assert (after["cancelled"], after["finished"]) == (before["cancelled"] + 1, before["finished"])
        finally:
            watcher.close()
        status = server.client.get(ticket["status_url"]).json()
        assert (status["status"], status["error_type"]) == ("COMPLETED", "client_cancelled")
        wait_until(lambda: bool(receiver.bodies))
        assert receiver.bodies[0]["request_id"] == ticket["request_id"]
        assert receiver.bodies[0]["status"] == "ERROR"


def test_progress_comes_from_the_engine(server: LaunchedServer) -> None:
    job_id = submit(server, **make_long_body(steps=500))
    seen = []
    while not seen or seen[-1]["status"] not in _OVER:
        seen.append(wait(server, job_id, "queued", "running", *_OVER))
        time.sleep(0.05)
    denoising = [job["progress"] for job in seen if job["progress"]["stage"] == "denoising"]
    fractions = [progress["fraction"] for progress in denoising]
    assert fractions == sorted(fractions)
    assert len(set(fractions)) > 1
    assert any(progress["eta_seconds"] for progress in denoising)
    assert seen[-1]["progress"] == {"stage": "done", "fraction": 1.0, "eta_seconds": None, "queue_position": None}
    with server.client.stream("GET", f"/jobs/{job_id}/events") as reply:
        events = [json.loads(line[6:]) for line in reply.iter_lines() if line.startswith("data: {")]
    stages = [event["stage"] for event in events if "stage" in event]
    assert (stages[0], stages[-1]) == ("queued", "done")
    assert {"started", "denoising"} <= set(stages)


def read_events(server: LaunchedServer, job_id: str, *, after: str = "0") -> Iterator[dict[str, Any]]:
    """The events of a job as they arrive: id, event and data."""
    event: dict[str, Any] = {}
    with server.client.stream("GET", f"/jobs/{job_id}/events", headers={"Last-Event-ID": after}) as reply:
        assert reply.status_code == 200
        for line in reply.iter_lines():
            name, _, value = line.partition(": ")
            if not line and event:
                yield event
                event = {}
            elif name:
                event[name] = json.loads(value) if name == "data" else value


def test_a_stream_goes_on_at_another_ingress_after_an_operator_cancelled(server: LaunchedServer, config: Path) -> None:
    job_id = submit(server, **make_long_body(steps=1000, duration=16, batch_size=4))
    told = []
    for event in read_events(server, job_id):  # its connection is given up in the middle
        told.append(event)
        if event["data"]["stage"] == "denoising":
            break
    command = [sys.executable, "-m", "stable_audio_serve.cli", "admin", "jobs", "cancel", job_id]
    done = subprocess.run(command, cwd=config.parent, capture_output=True, timeout=PATIENCE_S, check=True)
    assert b"asked to stop" in done.stdout
    last = next(event["id"] for event in reversed(told) if "id" in event)
    *rest, end = read_events(server, job_id, after=last)
    assert (end["id"], end["event"], end["data"]["status"]) == ("end", "end", "cancelled")
    assert all(int(event["id"]) > int(last) for event in rest if "id" in event)
    assert rest[-1]["data"]["message"] == "cancelled"
    assert server.client.delete(f"/jobs/{job_id}").json()["code"] == "job_is_over"


def test_a_replica_that_dies_in_the_middle_costs_no_attempt(server: LaunchedServer) -> None:
    job_id = submit(server, **make_long_body())
    wait(server, job_id, "running")
    (pid,) = server.pids("ServeReplica:audio:tiny")
    os.kill(pid, signal.SIGKILL)
    job = wait(server, job_id)
    assert (job["status"], job["attempts"]) == ("succeeded", 1)


def test_killed_runners_are_replaced_and_their_job_is_done_again(server: LaunchedServer) -> None:
    job_id = submit(server, **make_long_body())
    wait(server, job_id, "running")
    killed = server.pids("job-runner")
    assert len(killed) == 2
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    assert wait(server, job_id)["status"] == "succeeded"
    assert not set(killed) & set(server.pids("job-runner"))


def test_stores_that_were_moved_are_refused_also_by_processes_that_start_then(
    server: LaunchedServer, config: Path
) -> None:
    """Nobody makes an empty database in their place, which half of the requests would then see."""
    outputs, away = config.parent / "outputs", config.parent / "away"
    done = wait(server, submit(server))
    outputs.rename(away)
    try:
        killed = {server.pids("ServeReplica:audio:Ingress")[0], *server.pids("job-runner")}
        for pid in killed:
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: len(server.pids("job-runner")) == 2 and not killed & {*server.pids("ServeReplica")})
        deadline = time.monotonic() + 5.0
        while time.monotonic() < deadline:  # answers of the new ones among them
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
    assert wait(server, submit(server))["status"] == "succeeded"
    wait_until(lambda: server.client.get("/health").json()["job_store"]["state"] == "ok")


def scrape(port: int) -> dict[str, tuple[str, set[str]]]:
    """Type and labels of each of our metrics on Ray's page, the labels that Ray adds to all of them left out."""
    page = httpx.get(f"http://127.0.0.1:{port}/metrics").text
    types = dict(re.findall(r"^# TYPE (ray_stable_audio_\w+) (\w+)$", page, flags=re.MULTILINE))
    found = {}
    for name, kind in types.items():
        sample = re.search(rf"^{name}(?:_count)?{{(.*?)}} ", page, flags=re.MULTILINE)
        assert sample is not None, name
        found[name] = (kind, set(re.findall(r'(\w+)="', sample[1])) - _RAY_LABELS)
    return found


def test_a_real_run_exports_what_is_declared(server: LaunchedServer, config: Path, metrics_port: int) -> None:
    assert f"metrics: http://127.0.0.1:{metrics_port}/metrics" in server.output
    with Receiver() as receiver:
        job = wait(server, submit(server, webhook_url=receiver.url))
        server.client.get(f"/jobs/{job['id']}/events")
        for _ in range(2):  # the second finds its prompt in the cache
            server.client.post("/generate", json=make_body(model="tiny"))
        server.client.post("/generate", json=make_body(model="nope"))
        form, upload = {"prompt": "x", "duration": "2", "steps": "2"}, make_audio_file(duration_s=1.0)
        assert server.client.post("/v1/audio/variations", data=form, files={"audio": upload}).status_code == 200
        (config.parent / "outputs" / f"{job['id']}-stable-audio-3-tiny.wav").write_bytes(b"damaged")
        with suppress(httpx.HTTPError):
            server.client.get(job["download_url"])
        wanted = {name for name, metric in METRICS.items() if not metric.is_rare} | {"damaged_files"}
        found: dict[str, tuple[str, set[str]]] = {}
        deadline = time.monotonic() + PATIENCE_S
        while not {exported_name(METRICS[name]) for name in wanted} <= found.keys() and time.monotonic() < deadline:
            time.sleep(0.5)
            found |= scrape(metrics_port)
    declared = {exported_name(metric): (metric.kind, set(metric.labels)) for metric in METRICS.values()}
    assert {name: declared.get(name) for name in found} == found
    assert {exported_name(METRICS[name]) for name in wanted} <= found.keys()


def test_a_replaced_ingress_sends_the_readers_of_events_elsewhere(server: LaunchedServer) -> None:
    """Serve waits for requests of a replica that it stops, two minutes here, and a stream is one."""
    minutes = make_long_body(steps=1000, duration=16, batch_size=4, cfg_scale=3, sampler_kwargs={"sampler_type": "rk4"})
    job_id = submit(server, **minutes)
    assert len(server.pids("ServeReplica:audio:Ingress")) == 2
    with ThreadPoolExecutor(4) as pool:
        opened = threading.Semaphore(0)

        def read_events() -> str:
            with server.client.stream("GET", f"/jobs/{job_id}/events") as response:
                opened.release()
                return response.read().decode()

        streams = [pool.submit(read_events) for _ in range(4)]  # HAProxy shares them out
        assert all(opened.acquire(timeout=PATIENCE_S) for _ in streams)
        assert not any(stream.done() for stream in streams)
        with server.look_inside("tests.serving.rescale", "Ingress", "1") as rescaling:
            assert rescaling.wait(PATIENCE_S) == 0
        wait_until(lambda: len(server.pids("ServeReplica:audio:Ingress")) == 1)
        ended = [stream for stream in streams if stream.done()]
        assert len(ended) == 2
        for stream in ended:
            assert stream.result().rstrip().splitlines()[-1].startswith("retry: ")
        assert server.client.delete(f"/jobs/{job_id}").status_code == 202
        assert all("event: end" in stream.result() for stream in streams if stream not in ended)


def test_accepted_jobs_survive_the_death_of_everything(server: LaunchedServer, config: Path) -> None:
    """Some run, some wait, one has an upload: a server started later in the same folder does them all."""
    finished = wait(server, submit(server))
    bodies = [make_long_body(seed=seed) for seed in range(3)]
    job_ids = [submit(server, **body) for body in bodies]
    wait(server, job_ids[0], "running", *_OVER)
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
        watcher = Watcher(server, "tiny")
        wait_until(lambda: watcher.status()["in_flight"] == 1)
        watcher.close()
        server.signal(signal.SIGTERM)
        time.sleep(1.5)  # what comes sooner is taken for the same wish
        assert server.process.poll() is None
        assert server.start_s is not None
        assert server.stop(number=signal.SIGTERM) < server.start_s / 2  # as fast as this machine is just now
        assert isinstance(busy.exception(), httpx.TransportError)
    wait_until(lambda: not server.leftovers())
    assert not server.directory.exists()


class Receiver:
    """A server for webhooks, in a thread."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        bodies = self.bodies

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(204)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/hook"

    def __enter__(self) -> Receiver:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
