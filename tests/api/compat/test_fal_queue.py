"""fal's queue over HTTP, as documented: tickets, status, results, cancellation, webhooks and headers."""

from __future__ import annotations

import asyncio
import json
import uuid
from datetime import datetime
from typing import Any

import httpx
import pytest

from stable_audio_serve.core.errors import (
    DeadlineExceededError,
    GenerationError,
    InvalidRequestError,
    ModelUnavailableError,
    StorageError,
)
from stable_audio_serve.jobs.queue import JobQueue
from stable_audio_serve.jobs.runner.runner import JobRunner
from tests.api.compat.serving import make_client, make_hasty_client
from tests.backends import ToneBackend
from tests.patience import PATIENCE_S, until
from tests.webhook_receiver import receiving

APP = "/fal-ai/stable-audio"
QUEUE = f"/queue{APP}"
BODY = {"prompt": "rain", "seconds_total": 1}
LINKS = {"request_id", "response_url", "status_url", "cancel_url"}


async def submit(client: httpx.AsyncClient, **headers: str) -> dict[str, Any]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    reply = await client.post(QUEUE, json=BODY, headers=named)
    assert reply.status_code == 200, reply.text
    return reply.json()


async def wait_for(client: httpx.AsyncClient, ticket: dict[str, Any], status: str, *, logs: str = "1") -> Any:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            reply = await client.get(ticket["status_url"], params={"logs": logs})
            body = reply.json()
            assert reply.status_code == (200 if body["status"] == "COMPLETED" else 202)
            if body["status"] == status:
                return body
            assert body["status"] in ("IN_QUEUE", "IN_PROGRESS")
            await asyncio.sleep(0.02)


async def test_ticket_links_use_the_prefix_of_the_request(client: httpx.AsyncClient) -> None:
    ticket = await submit(client)
    request_id = ticket["request_id"]
    assert str(uuid.UUID(request_id)) == request_id
    url = f"http://localhost{QUEUE}/requests/{request_id}"
    assert ticket == {
        "status": "IN_QUEUE",
        "request_id": request_id,
        "gateway_request_id": request_id,
        "queue_position": ticket["queue_position"],
        "response_url": url,
        "status_url": f"{url}/status",
        "cancel_url": f"{url}/cancel",
    }
    assert ticket["queue_position"] >= 0


@pytest.mark.parametrize(
    ("path", "headers", "start"),
    [
        (APP, {"host": "queue.example.org"}, f"http://queue.example.org{APP}/"),
        (f"{QUEUE}/x/y", {}, f"http://localhost{QUEUE}/"),
        (f"/fal{QUEUE}", {}, f"http://localhost/fal{QUEUE}/"),
        (QUEUE, {"x-forwarded-proto": "https", "x-forwarded-host": "a.example"}, f"https://a.example{QUEUE}/"),
        (QUEUE, {"host": "a.example:8443", "x-forwarded-proto": "https"}, f"https://a.example:8443{QUEUE}/"),
    ],
)
async def test_links_use_host_and_prefix_of_the_submission(
    client: httpx.AsyncClient, path: str, headers: dict[str, str], start: str
) -> None:
    ticket = (await client.post(path, json=BODY, headers=headers)).json()
    for name in ("response_url", "status_url", "cancel_url"):
        assert ticket[name].startswith(f"{start}requests/{ticket['request_id']}")
    reply = await client.get(ticket["status_url"], headers=headers)
    assert reply.status_code == 202
    assert reply.json()["status_url"] == ticket["status_url"]


async def test_public_url_overrides_the_host() -> None:
    async with make_client(api={"public_url": "https://audio.example/base/"}, run_jobs=False) as (client, _):
        ticket = await submit(client)
    assert ticket["status_url"].startswith(f"https://audio.example/base{QUEUE}/requests/")


async def test_positions_count_from_zero() -> None:
    async with make_client(run_jobs=False) as (client, _):
        tickets = [await submit(client) for _ in range(3)]
        assert [ticket["queue_position"] for ticket in tickets] == [0, 1, 2]
        await client.put(tickets[0]["cancel_url"])
        assert (await wait_for(client, tickets[2], "IN_QUEUE"))["queue_position"] == 1


async def test_accepted_request_is_no_error_without_its_position(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: Any) -> int:
        raise StorageError("no answer")

    monkeypatch.setattr(JobQueue, "position", fail)
    reply = await client.post("/queue/fal-ai/stable-audio", json={"prompt": "rain"})
    assert (reply.status_code, reply.json()["queue_position"]) == (200, 0)


async def test_low_priority_is_batch_work_with_its_own_queue() -> None:
    async with make_client() as (client, backend):
        for priority, meaning in (("low", "batch"), ("normal", "interactive")):
            await wait_for(client, await submit(client, x_fal_queue_priority=priority), "COMPLETED")
            assert backend.last.priority == meaning
    async with make_client(run_jobs=False) as (client, _):
        tickets = [await submit(client, x_fal_queue_priority=priority) for priority in ("low", "normal", "low")]
        assert [ticket["queue_position"] for ticket in tickets] == [0, 0, 1]
        reply = await client.post(QUEUE, json=BODY, headers={"x-fal-queue-priority": "first"})
    assert (reply.status_code, reply.json()["detail"][0]["loc"]) == (422, ["header", "x-fal-queue-priority"])


# Value of the query parameter `logs` -> whether the status includes the log lines.
LOGS = {None: False, "0": False, "false": False, "1": True, "true": True}


async def test_status_has_the_fields_that_clients_read(
    client: httpx.AsyncClient, backend: ToneBackend, runner: JobRunner
) -> None:
    async def ask(logs: str | None) -> httpx.Response:
        return await client.get(ticket["status_url"], params={} if logs is None else {"logs": logs})

    backend.delay_s = 0.4
    backend.released.clear()
    ticket = await submit(client)
    await wait_for(client, ticket, "IN_PROGRESS")
    running = {logs: (await ask(logs)).json() for logs in LOGS}
    backend.released.set()
    await wait_for(client, ticket, "COMPLETED")
    for logs, has_logs in LOGS.items():
        assert running[logs].keys() == {"status", "logs", *LINKS}
        reply = await ask(logs)
        done = reply.json()
        assert done.keys() == {"status", "logs", "metrics", *LINKS}
        assert done["metrics"]["inference_time"] >= 0.3
        assert isinstance(done["logs"], list) is has_logs, logs
        assert isinstance(running[logs]["logs"], list) is has_logs, logs
        assert all(done[name] == ticket[name] for name in LINKS)
        assert reply.headers["x-fal-request-id"] == ticket["request_id"]
        if has_logs:
            assert done["logs"][: len(running[logs]["logs"])] == running[logs]["logs"]
            for entry in done["logs"]:
                assert entry.keys() == {"message", "level", "source", "timestamp"}
                assert (entry["level"], entry["source"]) == ("INFO", "USER")
                assert datetime.fromisoformat(entry["timestamp"]).tzinfo is not None


async def test_queued_request_has_a_position(client: httpx.AsyncClient) -> None:
    body = await wait_for(client, await submit(client), "IN_QUEUE")
    assert body.keys() == {"status", "queue_position", *LINKS}


async def test_result_is_the_output(client: httpx.AsyncClient, runner: JobRunner) -> None:
    ticket = await submit(client)
    await wait_for(client, ticket, "COMPLETED")
    for prefix in ("", "/queue", "/run", "/fal", "/fal/queue"):
        for suffix in ("", "/response"):
            reply = await client.get(f"{prefix}{APP}/requests/{ticket['request_id']}{suffix}")
            assert reply.status_code == 200, (prefix, suffix)
            assert reply.headers["x-fal-request-id"] == ticket["request_id"]
            file = reply.json()["audio_file"]
            assert (file["content_type"], file["file_name"]) == ("audio/wav", "stable-audio.wav")
            assert len((await client.get(file["url"])).content) == file["file_size"] == 44 + 4 * 44100


async def test_result_of_an_unfinished_request_is_400(client: httpx.AsyncClient) -> None:
    reply = await client.get((await submit(client))["response_url"])
    assert (reply.status_code, reply.json()) == (400, {"detail": "Request is still in progress"})


@pytest.mark.parametrize("request_id", ["7875a82d-0991-47c8-99fa-bdd57f4f0303", "no", "%2e%2e", "%00", "x" * 3000])
@pytest.mark.parametrize("suffix", ["", "/response", "/status", "/status/stream"])
async def test_unknown_request_is_404(client: httpx.AsyncClient, request_id: str, suffix: str) -> None:
    reply = await client.get(f"{QUEUE}/requests/{request_id}{suffix}")
    assert (reply.status_code, type(reply.json()["detail"])) == (404, str)
    assert len(reply.content) < 500


async def test_id_of_another_dialect_is_unknown(client: httpx.AsyncClient) -> None:
    reply = await client.post("/v2/generate/audio", json={"model": "stable-audio", "prompt": "x"})
    for request_id in (reply.json()["id"], reply.json()["id"].partition(":")[0]):
        assert (await client.get(f"{QUEUE}/requests/{request_id}")).status_code == 404
    ticket = await submit(client)
    for generation_id in (ticket["request_id"], ticket["request_id"] + ":stable-audio"):
        reply = await client.get("/v2/generate/audio", params={"generation_id": generation_id})
        assert reply.status_code == 404


FAILURES: list[tuple[Exception, int, str]] = [
    (GenerationError("NaN in /srv/secret"), 500, "internal_error"),
    (RuntimeError("secret"), 500, "internal_error"),
    (DeadlineExceededError("the time budget ran out"), 500, "generation_timeout"),
    (ModelUnavailableError("the model is away", retry_after_s=0.01), 500, "unavailable"),
    (InvalidRequestError("steps: too many for this model", field="steps"), 422, "bad_request"),
    (InvalidRequestError("a clip of 30 s takes 4 GB", field="duration"), 422, "bad_request"),
    (InvalidRequestError("this model cannot inpaint", field="audio"), 422, "bad_request"),
]


async def test_failure_keeps_its_status_and_body() -> None:
    async with make_hasty_client(jobs={"max_attempts": 1}) as (client, backend):
        for error, status, error_type in FAILURES:
            backend.error = error
            ticket = await submit(client)
            body = await wait_for(client, ticket, "COMPLETED")
            assert body["error_type"] == error_type, error
            assert body["error"]
            assert body["metrics"] == {"inference_time": None}
            reply = await client.get(ticket["response_url"])
            assert reply.status_code == status, error
            assert reply.headers["x-fal-request-id"] == ticket["request_id"]
            assert reply.headers["x-fal-retryable"] in ("false", "true")
            assert "secret" not in body["error"] + reply.text
            logs = (await client.get(ticket["status_url"], params={"logs": "1"})).json()["logs"]
            assert [entry["level"] for entry in logs] == ["INFO"] * (len(logs) - 1) + ["ERROR"]
            if status == 422:
                assert isinstance(error, InvalidRequestError)
                name = {"audio": "audio_url", "duration": "seconds_total"}.get(str(error.field), error.field)
                assert reply.json()["detail"][0]["loc"] == ["body", name]
                assert body["error"] == f"{name}: {reply.json()['detail'][0]['msg']}"
                assert body["error"] in {
                    "steps: too many for this model",
                    "seconds_total: a clip of 30 s takes 4 GB",
                    "audio_url: this model cannot inpaint",
                }
            else:
                assert reply.json() == {"detail": body["error"], "error_type": error_type}
                assert reply.headers["x-fal-error-type"] == error_type


async def test_request_that_cannot_start_in_time_fails() -> None:
    async with make_client(ToneBackend(delay_s=30), jobs={"max_running": 1}) as (client, _):
        first = await submit(client)
        await wait_for(client, first, "IN_PROGRESS")
        late = await submit(client, x_fal_request_timeout="0.1")
        body = await wait_for(client, late, "COMPLETED")
        assert body["error_type"] == "request_timeout"
        reply = await client.get(late["response_url"])
        assert (reply.status_code, reply.json()["error_type"]) == (504, "request_timeout")
        assert reply.headers["x-fal-request-timeout-type"] == "user"
        assert (await wait_for(client, first, "IN_PROGRESS"))["status"] == "IN_PROGRESS"


async def test_queued_request_is_cancelled_immediately(client: httpx.AsyncClient) -> None:
    ticket = await submit(client)
    reply = await client.put(ticket["cancel_url"])
    assert (reply.status_code, reply.json()) == (202, {"status": "CANCELLATION_REQUESTED"})
    body = await wait_for(client, ticket, "COMPLETED")
    assert body["error_type"] == "client_cancelled"
    assert body["error"]
    reply = await client.get(ticket["response_url"])
    assert (reply.status_code, reply.json()["error_type"]) == (499, "client_cancelled")
    assert isinstance(reply.json()["detail"], str)
    reply = await client.put(ticket["cancel_url"])
    assert (reply.status_code, reply.json()) == (400, {"status": "ALREADY_COMPLETED"})


async def test_running_request_is_cancelled(client: httpx.AsyncClient, backend: ToneBackend, runner: JobRunner) -> None:
    backend.delay_s = 30
    ticket = await submit(client)
    await wait_for(client, ticket, "IN_PROGRESS")
    await until(lambda: backend.num_running == 1)  # the status changes before the generation starts
    reply = await client.put(ticket["cancel_url"], headers={"content-type": "application/json"})
    assert (reply.status_code, reply.json()) == (202, {"status": "CANCELLATION_REQUESTED"})
    assert (await wait_for(client, ticket, "COMPLETED"))["error_type"] == "client_cancelled"
    assert backend.num_cancelled == 1


async def test_cancelling_an_ended_or_unknown_request(client: httpx.AsyncClient, runner: JobRunner) -> None:
    ticket = await submit(client)
    await wait_for(client, ticket, "COMPLETED")
    reply = await client.put(ticket["cancel_url"])
    assert (reply.status_code, reply.json()) == (400, {"status": "ALREADY_COMPLETED"})
    reply = await client.put(f"{QUEUE}/requests/{uuid.uuid4()}/cancel")
    assert (reply.status_code, reply.json()) == (404, {"status": "NOT_FOUND"})


async def test_full_queue_is_429_with_retry_after() -> None:
    async with make_client(jobs={"max_queued": 1}, run_jobs=False) as (client, _):
        await submit(client)
        reply = await client.post(QUEUE, json=BODY)
    assert (reply.status_code, reply.headers["x-fal-retryable"]) == (429, "true")
    assert int(reply.headers["retry-after"]) >= 1


async def test_webhook_is_called_at_the_end() -> None:
    errors = (None, GenerationError("silence"), InvalidRequestError("steps: no", field="steps"))
    async with receiving() as receiver, make_client(jobs={"webhook_allow_hosts": ["127.0.0.1"]}) as (client, backend):
        for number, error in enumerate(errors):
            backend.error = error
            reply = await client.post(QUEUE, json=BODY, params={"fal_webhook": receiver.url})
            ticket = reply.json()
            assert ticket["status"] == "IN_QUEUE"
            await until(lambda count=number: len(receiver.requests) > count)  # type: ignore[misc]
            result = await client.get(ticket["response_url"])
            status = await wait_for(client, ticket, "COMPLETED")
            body = json.loads(receiver.requests[number][2])
            assert body.pop("error", None) == status.get("error")
            assert body == {
                "request_id": ticket["request_id"],
                "gateway_request_id": ticket["request_id"],
                "status": "OK" if error is None else "ERROR",
                "payload": result.json(),
            }


@pytest.mark.parametrize(
    "url", ["http://10.0.0.1/", "http://[::1]/", "ftp://example.org/", "no url", "http://metadata.internal/"]
)
async def test_webhooks_to_private_networks_are_refused(client: httpx.AsyncClient, url: str) -> None:
    reply = await client.post(QUEUE, json=BODY, params={"fal_webhook": url})
    assert (reply.status_code, reply.json()["detail"][0]["loc"]) == (422, ["query", "fal_webhook"])
