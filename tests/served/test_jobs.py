"""Jobs of a real server: their files, progress, events, cancellation, webhooks and metrics."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from stable_audio_serve.cli import app
from stable_audio_serve.core.metrics import METRICS, exported_name
from tests.audio_files import make_audio_file
from tests.patience import PATIENCE_S, wait_until
from tests.served.conftest import count_ended, make_body, make_long_body, submit, wait
from tests.serving.launched import LaunchedServer
from tests.serving.webhooks import Receiver

pytestmark = pytest.mark.server

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


@pytest.fixture(scope="module")
def folder(server: LaunchedServer) -> Path:
    """Return the server's working directory."""
    return Path(f"/proc/{server.process.pid}/cwd").resolve()


def test_job_file_is_stored_below_the_working_directory(server: LaunchedServer, folder: Path) -> None:
    job = wait(server, submit(server, make_body()))
    assert job["status"] == "succeeded", job
    assert job["download_url"] == f"{server.url}/jobs/{job['id']}/audio"
    audio = server.client.get(job["download_url"]).content
    assert audio == server.client.post("/generate", json=make_body(model="tiny")).content
    assert (folder / "outputs" / f"{job['id']}-stable-audio-3-tiny.wav").read_bytes() == audio
    assert (folder / "outputs" / "jobs.db").is_file()


def test_cancel_reaches_the_engine_and_the_webhook(server: LaunchedServer, metrics_port: int) -> None:
    wait_until(lambda: server.num_requests("tiny") == 0)  # the reported requests may still be those of another test
    before = count_ended(metrics_port)
    with Receiver() as receiver:
        path = f"/queue/fal-ai/stable-audio?fal_webhook={receiver.url}"
        ticket = server.client.post(path, json={"prompt": "x", "seconds_total": 16, "steps": 1000}).json()
        wait_until(lambda: server.client.get(ticket["status_url"]).json()["status"] == "IN_PROGRESS")
        wait_until(lambda: server.num_requests("tiny") == 1)
        assert server.client.put(ticket["cancel_url"]).status_code == 202
        # Not always by one, because cancelled requests of another test may be counted only now.
        wait_until(lambda: count_ended(metrics_port)["cancelled"] > before["cancelled"])
        wait_until(lambda: server.num_requests("tiny") == 0)  # the replica reports its requests once a second
        status = server.client.get(ticket["status_url"]).json()
        assert (status["status"], status["error_type"]) == ("COMPLETED", "client_cancelled")
        wait_until(lambda: bool(receiver.bodies))
        assert receiver.bodies[0]["request_id"] == ticket["request_id"]
        assert receiver.bodies[0]["status"] == "ERROR"


def test_job_progress_comes_from_the_engine(server: LaunchedServer) -> None:
    minutes = submit(server, make_long_body())  # so long that polls see its progress on a busy machine, too
    denoising: list[dict[str, Any]] = []

    def has_progressed() -> bool:
        progress = server.client.get(f"/jobs/{minutes}").json()["progress"]
        if progress["stage"] == "denoising":
            denoising.append(progress)
        return len({each["fraction"] for each in denoising}) > 1 and any(each["eta_seconds"] for each in denoising)

    wait_until(has_progressed)
    fractions = [each["fraction"] for each in denoising]
    assert fractions == sorted(fractions)
    assert server.client.delete(f"/jobs/{minutes}").status_code == 202
    job_id = submit(server, make_body(steps=500, duration=4))
    done = {"stage": "done", "fraction": 1.0, "eta_seconds": None, "queue_position": None}
    assert wait(server, job_id)["progress"] == done
    with server.client.stream("GET", f"/jobs/{job_id}/events") as reply:
        events = [json.loads(line[6:]) for line in reply.iter_lines() if line.startswith("data: {")]
    stages = [event["stage"] for event in events if "stage" in event]
    assert (stages[0], stages[-1]) == ("queued", "done")
    assert {"started", "denoising"} <= set(stages)


def read_events(server: LaunchedServer, job_id: str, *, after: str = "0") -> Iterator[dict[str, Any]]:
    """Yield the server-sent events of a job as they arrive, each with its fields `id`, `event` and `data`."""
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


def test_event_stream_resumes_after_an_operator_cancels(
    server: LaunchedServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)  # the command finds the server's database as an operator's process does
    CliRunner().invoke(app, ["admin", "jobs", "cancel", "0" * 32])  # imports modules before the model works for minutes
    job_id = submit(server, make_long_body())
    received = []
    for event in read_events(server, job_id):  # `break` closes the connection
        received.append(event)
        if event["data"]["stage"] == "denoising":
            break
    done = CliRunner().invoke(app, ["admin", "jobs", "cancel", job_id])
    assert (done.exit_code, "asked to stop" in done.output) == (0, True)
    last = next(event["id"] for event in reversed(received) if "id" in event)
    *rest, end = read_events(server, job_id, after=last)
    assert (end["id"], end["event"], end["data"]["status"]) == ("end", "end", "cancelled")
    assert all(int(event["id"]) > int(last) for event in rest if "id" in event)
    assert rest[-1]["data"]["message"] == "cancelled"
    assert server.client.delete(f"/jobs/{job_id}").json()["code"] == "job_is_over"


def scrape(port: int) -> dict[str, tuple[str, set[str]]]:
    """Read the page of metrics.

    Returns the type and the labels of each of our metrics, without labels that Ray adds.
    """
    page = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=PATIENCE_S).text
    types = dict(re.findall(r"^# TYPE (ray_stable_audio_\w+) (\w+)$", page, flags=re.MULTILINE))
    found = {}
    for name, kind in types.items():
        sample = re.search(rf"^{name}(?:_count)?{{(.*?)}} ", page, flags=re.MULTILINE)
        assert sample is not None, name
        found[name] = (kind, set(re.findall(r'(\w+)="', sample[1])) - _RAY_LABELS)
    return found


def test_a_real_run_exports_the_declared_metrics(server: LaunchedServer, folder: Path, metrics_port: int) -> None:
    assert f"metrics: http://127.0.0.1:{metrics_port}/metrics" in server.output
    with Receiver() as receiver:
        job = wait(server, submit(server, make_body(webhook_url=receiver.url)))
        server.client.get(f"/jobs/{job['id']}/events")
        for _ in range(2):  # the prompt cache has the second request's prompt
            server.client.post("/generate", json=make_body(model="tiny"))
        server.client.post("/generate", json=make_body(model="nope"))
        form, upload = {"prompt": "x", "duration": "2", "steps": "2"}, make_audio_file(duration_s=1.0)
        assert server.client.post("/v1/audio/variations", data=form, files={"audio": upload}).status_code == 200
        (folder / "outputs" / f"{job['id']}-stable-audio-3-tiny.wav").write_bytes(b"damaged")
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
