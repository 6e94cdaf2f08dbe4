"""A whole server, with its own HAProxy, over HTTP."""

from __future__ import annotations

import io
import json
import os
import resource
import socket
import time
import wave
import zipfile
from contextlib import ExitStack, suppress
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from stable_audio_serve.core.processor import has_native_bfloat16
from stable_audio_serve.core.settings import Settings
from tests.patience import PATIENCE_S, wait_until
from tests.served.conftest import count_ended, make_body, make_long_body, submit, wait
from tests.serving.launched import LaunchedServer
from tests.serving.load import finished

pytestmark = pytest.mark.server


def make_wav() -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(2)
        writer.setsampwidth(2)
        writer.setframerate(1000)
        writer.writeframes(b"\x01\x02" * 2 * 1000)
    return file.getvalue()


def read_wav(response: httpx.Response) -> wave.Wave_read:
    assert response.status_code == 200, response.text
    return wave.open(io.BytesIO(response.content))


def test_starting_server_is_alive_before_it_is_ready(server: LaunchedServer) -> None:
    *before, last = [
        (health.status_code, health.json()["status"], health.json()["healthy"], ready)
        for health, ready in server.probes
    ]
    loading = (200, "loading", False, 503)
    assert before[:2] == [loading, loading]
    # When one HTTP process already knows that the model is ready, the other process may not know it yet. The word is ok
    # also if only the other model is loaded.
    assert set(before) <= {loading, (200, "ok", True, 503), (200, "ok", False, 503)}
    assert last[-1] == 200
    assert server.client.get("/health").json()["device"] in ("cpu", "cuda:0")


@pytest.mark.parametrize("path", ["/v1/audio/generations", "/generate", "/sa3/v1/audio/generations"])
def test_text_becomes_audio(server: LaunchedServer, path: str) -> None:
    wav = read_wav(server.client.post(path, json=make_body()))
    assert (wav.getnchannels(), wav.getframerate(), wav.getnframes()) == (2, 1000, 2000)


def test_host_and_origin_checks_work_behind_the_proxy(server: LaunchedServer) -> None:
    def ask(method: str, path: str, **headers: str) -> int:
        return server.client.request(method, path, json=make_body(), headers=headers).status_code

    assert ask("GET", "/v1/models", Host="evil.example:8000") == 403
    assert ask("GET", "/v1/models", Host="queue.localhost") == 200
    assert [ask("GET", path, Host="evil.example") for path in ("/health", "/ready", "/sa3/health")] == [200] * 3
    assert [ask("POST", "/generate", Origin=origin) for origin in ("https://evil.example", "null")] == [403] * 2
    assert ask("POST", "/generate", Origin="http://localhost:3000") == 200
    own = f"http://10.0.0.7:{server.client.base_url.port}"
    assert ask("POST", "/generate", Origin=own, Host=own.removeprefix("http://")) == 200


def test_same_request_same_bytes_and_one_request_id(server: LaunchedServer) -> None:
    headers = {"x-request-id": "mine"}
    first = server.client.post("/generate", json=make_body(), headers=headers)
    second = server.client.post("/generate", json=make_body())
    assert first.content == second.content
    assert first.headers.get_list("x-request-id") == ["mine"]


def test_several_variations_are_a_zip(server: LaunchedServer) -> None:
    response = server.client.post("/generate", json=make_body(batch_size=3, model="little"))
    names = zipfile.ZipFile(io.BytesIO(response.content)).namelist()
    assert names == [f"stable-audio-3-tiny-{index:02d}.wav" for index in (1, 2, 3)]


@pytest.mark.parametrize(
    ("path", "fields"),
    [("variations", {}), ("inpaint", {"inpaint_start_seconds": "1", "inpaint_end_seconds": "2"})],
)
def test_audio_becomes_audio(server: LaunchedServer, path: str, fields: dict[str, str]) -> None:
    form = {key: str(value) for key, value in make_body(**fields).items()}
    response = server.client.post(f"/v1/audio/{path}", data=form, files={"audio": ("a.wav", make_wav())})
    assert read_wav(response).getnframes() == 2000


def test_health_reports_models_and_devices(server: LaunchedServer) -> None:
    health = server.client.get("/health").json()
    assert health["status"] == "ok"
    assert health["preload_models"] == ["tiny", "demo"]
    assert "tiny" in health["loaded_models"]
    assert health["models"]["tiny"]["device"] in ("cpu", "cuda:0")
    assert set(health["models"]["tiny"]["detail"]) == {"import", "load", "warm_up", "hash", "quality_gate"}


def test_models_and_pages(server: LaunchedServer) -> None:
    models = server.client.get("/v1/models").json()["data"]
    assert [model["id"] for model in models] == ["tiny", "demo", "demo:octave-down"]
    assert "/v1/audio/inpaint" in server.client.get("/openapi.json").json()["paths"]
    assert server.client.get("/docs").status_code == 200


def test_haproxy_reload_waits_for_the_longest_request(server: LaunchedServer) -> None:
    (rendered,) = server.directory.rglob("haproxy.cfg")
    assert f" hard-stop-after {Settings().api.max_deadline_s:.0f}s\n" in rendered.read_text()


def test_environment_variables_set_the_limits(server: LaunchedServer) -> None:
    assert server.client.get("/health").json()["max_steps"] == 1000
    response = server.client.post("/generate", json=make_body(steps=1001))
    assert response.status_code == 422
    assert response.json()["detail"][0]["loc"] == ["body", "steps"]


def test_model_error_reaches_the_client_unchanged(server: LaunchedServer) -> None:
    body = make_body(sampler_kwargs={"sampler_type": "no-such-sampler"})
    response = server.client.post("/generate", json=body)
    assert response.status_code in (400, 422)
    assert "sampler" in response.text


def test_refusals_log_no_traceback(server: LaunchedServer) -> None:
    num_lines = len(server.lines)
    server.client.post("/generate", json=make_body(sampler_kwargs={"sampler_type": "no-such-sampler"}))
    server.client.post("/generate", json=make_body(deadline_s=0.001))
    server.client.get("/v1/models", headers={"X-Request-Id": "the-last-line"})
    server.wait_for_output("the-last-line")
    assert not [line for line in server.lines[num_lines:] if "Traceback" in line]


def test_late_request_ends_at_its_deadline(server: LaunchedServer) -> None:
    started_at = time.monotonic()
    response = server.client.post("/generate", json=make_long_body(deadline_s=1))
    assert response.status_code == 504
    assert time.monotonic() - started_at < 15  # without the deadline, the generation would take longer


def test_every_stage_of_the_start_is_printed(server: LaunchedServer) -> None:
    assert "cold start: ray" in server.output
    server.wait_for_output("model ready: model=tiny")
    assert "import_s=" in server.output
    assert f"ready: {server.url}" in server.output
    assert "\x1b" not in server.output  # no colour codes, because the output does not go to a terminal


def test_start_names_models_that_bfloat16_would_speed_up(server: LaunchedServer) -> None:
    device = wait_until(lambda: server.client.get("/health").json()["models"]["tiny"]["device"])
    server.wait_for_output("model ready: model=tiny")  # logged after the hint
    hint = "this CPU supports bfloat16, but float32 is used for tiny."
    assert (hint in server.output) is (device == "cpu" and has_native_bfloat16())


def test_a_hundred_instant_disconnects_stop_their_rows(server: LaunchedServer, metrics_port: int) -> None:
    wait_until(lambda: server.num_requests("tiny") == 0)  # the reported requests may still be those of another test
    before = count_ended(metrics_port)
    deadline_s = 60.0  # ends requests if Ray Serve does not notice that the client has disconnected
    body = json.dumps(make_long_body(deadline_s=deadline_s)).encode()
    request = b"POST /generate HTTP/1.1\r\nHost: [::]\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
    for index in range(100):
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(request % (len(body), body))
            # Some clients disconnect before Serve has chosen a replica, some before the model works, and one later.
            time.sleep(index % 20 / 1000)
            if index == 99:
                wait_until(lambda: server.num_requests("tiny") > 0)
    # The engine stops a cancelled row when its current step ends.
    wait_until(lambda: count_ended(metrics_port)["cancelled"] > before["cancelled"])
    wait_until(lambda: server.num_requests("tiny") == 0)
    assert count_ended(metrics_port)["expired"] - before["expired"] <= 5
    assert server.client.get("/v1/status").json()["models"]["tiny"]["backlog_s"] == 0


@pytest.mark.slow
def test_a_thousand_slow_uploads_delay_no_other_request(server: LaunchedServer) -> None:
    head = b"POST /v1/audio/variations HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=B\r\n"
    part = b'--B\r\nContent-Disposition: form-data; name="audio"; filename="a.wav"\r\n\r\n'
    beginning = part + b"-" * 20_000  # more than HAProxy's buffer holds, so it forwards the upload
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(4096, hard)), hard))
    with ExitStack() as stack:
        uploads = [stack.enter_context(socket.create_connection(("127.0.0.1", server.port))) for _ in range(1000)]
        for upload in uploads:
            upload.sendall(head + b"Content-Length: 1000000\r\n\r\n" + beginning)
        assert server.client.get("/health").status_code == 200
        read_wav(server.client.post("/generate", json=make_body(duration=1)))
        answers = []
        for upload in uploads[-500:]:  # the first 500 are more than the server receives at once
            upload.settimeout(PATIENCE_S)
            answers.append(upload.recv(4096).lower())
    assert {answer[:13] for answer in answers} <= {b"http/1.1 503 ", b"http/1.1 408 "}
    refused = [answer for answer in answers if answer.startswith(b"http/1.1 503 ")]
    assert refused  # not necessarily all: on a slow machine, earlier uploads may have ended and made room
    assert all(b"\r\nretry-after: 5\r\n" in answer for answer in refused)


def test_slow_readers_do_not_fill_the_memory(server: LaunchedServer) -> None:
    def memory_mb() -> float:
        pids = server.pids("ServeReplica:audio:Ingress")
        return sum(psutil.Process(pid).memory_info().rss for pid in pids) / 1e6

    job_id = submit(server, make_body(model="demo", duration=20, batch_size=4))
    path = urlsplit(wait(server, job_id)["download_url"]).path
    assert int(server.client.head(path).headers["content-length"]) > 10e6
    before_mb = memory_mb()
    with ExitStack() as stack:
        for _ in range(64):
            reader = stack.enter_context(socket.socket())
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            reader.settimeout(PATIENCE_S)
            reader.connect(("127.0.0.1", server.port))
            reader.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            assert reader.recv(1000).startswith(b"HTTP/1.1 200 ")
        time.sleep(5)
        assert memory_mb() - before_mb < 64 * 2.5  # the files together have over 640 MB


def test_other_processes_run_at_lower_priority_than_models(server: LaunchedServer) -> None:
    own = os.getpriority(os.PRIO_PROCESS, 0)
    (model,) = server.pids("ServeReplica:audio:tiny")
    assert os.getpriority(os.PRIO_PROCESS, model) == own  # by default, Ray would give it the lowest priority
    for name in ("Ingress", "job-runner"):
        pids = server.pids(f"ServeReplica:audio:{name}")
        threads = [int(thread) for pid in pids for thread in os.listdir(f"/proc/{pid}/task")]
        niceness = set()
        for thread in threads:
            with suppress(ProcessLookupError):  # the thread may have ended since it was listed
                niceness.add(os.getpriority(os.PRIO_PROCESS, thread))
        assert min(niceness) == min(own + 5, 19)
        # Threads that encode audio have a still lower priority than the event loop.
        assert niceness <= {min(own + 5, 19), min(own + 10, 19)}


def test_only_model_processes_load_torch(server: LaunchedServer) -> None:
    read_wav(server.client.post("/generate", json=make_body()))
    finished(server.client, server.client.post("/jobs", json=make_body()).json()["id"])
    for name, runs_models in (("tiny", True), ("Ingress", False), ("job-runner", False)):
        for pid in server.pids(f"ServeReplica:audio:{name}"):
            assert ("libtorch" in Path(f"/proc/{pid}/maps").read_text()) == runs_models, name
