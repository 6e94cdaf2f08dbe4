"""Jobs that are submitted again, with an idempotency key or an id that the client chose, in sequence or at once."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import httpx
import pytest

from stable_audio_serve.core.errors import StorageError
from stable_audio_serve.core.keys import hash_key
from stable_audio_serve.core.settings import Settings
from stable_audio_serve.jobs.job import JobSpec
from stable_audio_serve.jobs.queue import JobQueue
from stable_audio_serve.jobs.runner.runner import JobRunner
from stable_audio_serve.jobs.store.client_jobs import ClientJobs
from tests.api.compat.serving import make_client
from tests.api.test_jobs import BODY, REGION, wait
from tests.audio_files import make_audio_file
from tests.backends import ToneBackend

pytestmark = pytest.mark.server

PATHS = ("/jobs", "/jobs/variations", "/jobs/inpaint")
WAV = make_audio_file(duration_s=0.2)


async def post(
    client: httpx.AsyncClient, path: str, *, key: str | None, audio: bytes = WAV, **fields: Any
) -> httpx.Response:
    """Submit a job with `BODY` and `fields`: as a form with an upload if the path needs one, otherwise as JSON."""
    headers = {} if key is None else {"Idempotency-Key": key}
    if path == "/jobs":
        return await client.post(path, json=BODY | fields, headers=headers)
    region = REGION if path.endswith("inpaint") else {}
    form = {name: str(value) for name, value in (BODY | region | fields).items()}
    return await client.post(path, data=form, files={"audio": ("a.wav", audio)}, headers=headers)


def uploads(settings: Settings) -> int:
    folder = Path(settings.output_dir) / "uploads"
    return len(list(folder.iterdir())) if folder.exists() else 0


def expect_conflict(reply: httpx.Response, code: str, named: str) -> None:
    assert reply.status_code == 409, reply.text
    assert reply.json().keys() == {"detail", "code"}
    assert reply.json()["code"] == code
    assert named in reply.json()["detail"]


@pytest.mark.parametrize("path", PATHS)
async def test_repeated_request_returns_the_same_job(client: httpx.AsyncClient, settings: Settings, path: str) -> None:
    key = f"again-{path}"
    first = await post(client, path, key=key)
    kept = uploads(settings)
    again = await post(client, path, key=key)
    assert (first.status_code, again.status_code) == (202, 202), again.text
    assert again.json() == first.json()
    assert "idempotent-replayed" not in first.headers
    assert again.headers["idempotent-replayed"] == "true"
    assert uploads(settings) == kept
    prefixed = await client.post("/sa3/jobs", json=BODY, headers={"Idempotency-Key": key}) if path == "/jobs" else None
    if prefixed is not None:
        assert prefixed.json()["id"] == first.json()["id"]
        assert prefixed.json()["status_url"] == f"http://localhost/sa3/jobs/{first.json()['id']}"


async def test_repeat_after_the_end_returns_the_same_job(client: httpx.AsyncClient, runner: JobRunner) -> None:
    ticket = (await post(client, "/jobs", key="late")).json()
    assert (await wait(client, ticket))["status"] == "succeeded"
    assert (await post(client, "/jobs", key="late")).json() == ticket


async def test_equivalent_spelling_is_the_same_request(client: httpx.AsyncClient) -> None:
    headers = {"Idempotency-Key": "spelling", "Content-Type": "application/json"}
    bodies = (
        b'{"prompt": "rain", "duration": 2, "steps": 5, "sampler_kwargs": {"a": 1, "b": 2}}',
        b'{"sampler_kwargs":{"b":2,"a":1},"steps":"5","duration":2.0,"prompt":" rain ","unknown":[1]}',
    )
    first, second = [(await client.post("/jobs", content=body, headers=headers)).json() for body in bodies]
    assert first["ignored"] == ["sampler_kwargs.a", "sampler_kwargs.b"]
    assert second == first | {"ignored": ["unknown", "sampler_kwargs.b", "sampler_kwargs.a"]}


@pytest.mark.parametrize(
    ("path", "other"),
    [
        ("/jobs", {"prompt": "hail"}),
        ("/jobs", {"duration": 1.6}),
        ("/jobs", {"seed": -1}),
        ("/jobs", {"steps": 8}),  # the default number of steps, but given explicitly
        ("/jobs", {"priority": "batch"}),
        ("/jobs", {"webhook_url": "http://localhost/hook"}),
        ("/jobs/variations", {"init_noise_level": 0.5}),
        ("/jobs/variations", {"audio": make_audio_file(duration_s=0.3)}),
        ("/jobs/inpaint", {"inpaint_end_seconds": "1.1"}),
    ],
)
async def test_different_request_with_a_used_key_is_a_conflict(
    client: httpx.AsyncClient, settings: Settings, path: str, other: dict[str, Any]
) -> None:
    key = f"used-{path}-{sorted(other)}"
    assert (await post(client, path, key=key)).status_code == 202
    kept = uploads(settings)
    expect_conflict(await post(client, path, key=key, **other), "idempotency_key_reused", "Idempotency-Key")
    assert uploads(settings) == kept


async def test_key_belongs_to_one_route(client: httpx.AsyncClient) -> None:
    assert (await post(client, "/jobs", key="route")).status_code == 202
    expect_conflict(await post(client, "/jobs/variations", key="route"), "idempotency_key_reused", "Idempotency-Key")


async def test_random_seed_is_drawn_once(client: httpx.AsyncClient, backend: ToneBackend, runner: JobRunner) -> None:
    tickets = [(await post(client, "/jobs", key="random", seed=-1)).json() for _ in range(3)]
    assert tickets[0] == tickets[1] == tickets[2]
    await wait(client, tickets[0])
    assert len(backend.requests) == 1


@pytest.mark.parametrize("key", ["", "x" * 256, "two words", "caf\u00e9", "tab\there"])
async def test_invalid_key_is_named(client: httpx.AsyncClient, key: str) -> None:
    for path in PATHS:
        form: dict[str, Any] = {"json": BODY} if path == "/jobs" else {"data": BODY | REGION, "files": {"audio": WAV}}
        reply = await client.post(path, headers=[(b"idempotency-key", key.encode("latin-1"))], **form)
        assert reply.status_code == 422
        assert [item["loc"] for item in reply.json()["detail"]] == [["header", "Idempotency-Key"]]


@pytest.mark.parametrize("key", ["a", "!~" * 127 + "!"])
async def test_shortest_and_longest_key(client: httpx.AsyncClient, key: str) -> None:
    assert (await post(client, "/jobs", key=key)).status_code == 202


@pytest.mark.parametrize("path", ["/jobs", "/jobs/variations"])
async def test_fifty_concurrent_submissions_are_one_job(
    client: httpx.AsyncClient, jobs: JobQueue, settings: Settings, path: str
) -> None:
    before, kept = jobs.store.runners.outlook("").num_queued, uploads(settings)
    replies = await asyncio.gather(*(post(client, path, key=f"fifty-{path}") for _ in range(50)))
    assert {reply.status_code for reply in replies} == {202}
    assert len({reply.json()["id"] for reply in replies}) == 1
    assert len({reply.json()["status_url"] for reply in replies}) == 1
    assert sum("idempotent-replayed" not in reply.headers for reply in replies) == 1
    assert jobs.store.runners.outlook("").num_queued == before + 1
    assert uploads(settings) == kept + (path != "/jobs")
    expect_conflict(
        await post(client, path, key=f"fifty-{path}", prompt="other"), "idempotency_key_reused", "Idempotency-Key"
    )


async def test_repeat_succeeds_even_if_the_queue_is_full() -> None:
    async with make_client(run_jobs=False, jobs={"max_queued": 1}) as (client, _):
        ticket = (await post(client, "/jobs", key="full")).json()
        assert (await post(client, "/jobs", key="other")).status_code == 503
        assert (await post(client, "/jobs", key="full")).json() == ticket


async def test_accepted_job_keeps_its_upload_if_the_commits_result_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """The database stores the job and then the connection is cut, so the client gets an error and retries."""
    add_all = ClientJobs.add_all

    def add_and_lose_the_answer(jobs: ClientJobs, specs: Sequence[JobSpec]) -> NoReturn:
        monkeypatch.setattr(ClientJobs, "add_all", add_all)
        add_all(jobs, specs)
        raise StorageError("the connection was cut")

    async with make_client() as (client, _):
        monkeypatch.setattr(ClientJobs, "add_all", add_and_lose_the_answer)
        assert (await post(client, "/jobs/variations", key="lost")).status_code == 503
        again = await post(client, "/jobs/variations", key="lost")
        assert again.headers["idempotent-replayed"] == "true"
        assert (await wait(client, again.json()))["status"] == "succeeded"


async def test_other_origins_can_read_the_replay_header(client: httpx.AsyncClient) -> None:
    reply = await client.get("/health", headers={"Origin": "https://page.example"})
    assert "Idempotent-Replayed" in reply.headers["access-control-expose-headers"]


async def test_api_keys_do_not_share_idempotency_keys() -> None:
    async with make_client(run_jobs=False, api={"key_hashes": [hash_key("one"), hash_key("two")]}) as (client, _):
        ids = {}
        for name in ("one", "two"):
            client.headers["Authorization"] = f"Bearer {name}"
            ids[name] = (await post(client, "/jobs", key="same", prompt=name)).json()["id"]
            client.headers["Authorization"] = f"Key {name}"
            assert (await post(client, "/jobs", key="same", prompt=name)).json()["id"] == ids[name]
        assert ids["one"] != ids["two"]


ID = "0123456789abcdef0123456789abcd"


async def test_job_has_the_chosen_id(client: httpx.AsyncClient, runner: JobRunner) -> None:
    url = f"/jobs/{ID}01"
    first = await client.put(url, json=BODY)
    assert first.status_code == 202
    assert first.json() == {"id": f"{ID}01", "status": "queued", "status_url": f"http://localhost/jobs/{ID}01"}
    again = await client.put(url, json=dict(reversed(BODY.items())))
    assert (again.status_code, again.json()) == (202, first.json())
    assert again.headers["idempotent-replayed"] == "true"
    expect_conflict(await client.put(url, json=BODY | {"seed": 12}), "id_in_use", "id")
    status = await wait(client, first.json())
    assert (status["status"], status["id"]) == ("succeeded", f"{ID}01")
    download = await client.get(f"{url}/audio")
    assert download.content == (await client.post("/v1/audio/generations", json=BODY)).content


@pytest.mark.parametrize(
    "job_id", [ID, f"{ID}0G", f"{ID}ABCDEF", f"{ID}0 ", "x", "%00", "a" * 3000, f"{ID}012", "é" * 32]
)
async def test_invalid_id_is_named(client: httpx.AsyncClient, job_id: str) -> None:
    reply = await client.put(f"/jobs/{job_id}", json=BODY)
    assert reply.status_code == 422
    assert [item["loc"] for item in reply.json()["detail"]] == [["path", "job_id"]]


async def test_invalid_body_does_not_use_up_an_id(client: httpx.AsyncClient) -> None:
    url = f"/jobs/{ID}02"
    assert (await client.put(url, json={"prompt": " "})).status_code == 422
    assert (await client.get(url)).status_code == 404
    assert (await client.put(url, json=BODY)).status_code == 202


async def test_race_for_one_id_has_one_winner(client: httpx.AsyncClient, jobs: JobQueue) -> None:
    before = jobs.store.runners.outlook("").num_queued
    bodies = [BODY | {"seed": number % 5} for number in range(50)]
    replies = await asyncio.gather(*(client.put(f"/jobs/{ID}03", json=body) for body in bodies))
    won = {body["seed"] for body, reply in zip(bodies, replies, strict=True) if reply.status_code == 202}
    assert len(won) == 1
    assert {reply.status_code for reply in replies} == {202, 409}
    assert sum(reply.status_code == 202 for reply in replies) == 10
    assert jobs.store.runners.outlook("").num_queued == before + 1


async def test_id_of_a_posted_job_cannot_be_chosen(client: httpx.AsyncClient) -> None:
    ticket = (await post(client, "/jobs", key=None)).json()
    expect_conflict(await client.put(f"/jobs/{ticket['id']}", json=BODY), "id_in_use", "id")


@pytest.mark.parametrize(
    "url",
    [
        "http://10.0.0.1/",
        "http://[::1]/",
        "http://169.254.169.254/latest/meta-data",
        "http://metadata.internal/",
        "ftp://example.org/",
        "no url",
        "http://user@example.org/",
        "x" * 3000,
    ],
)
async def test_webhooks_to_private_networks_are_refused(client: httpx.AsyncClient, url: str) -> None:
    for path in PATHS:
        reply = await post(client, path, key=None, webhook_url=url)
        assert reply.status_code == 422
        assert [item["loc"] for item in reply.json()["detail"]] == [["body", "webhook_url"]]


@pytest.mark.parametrize("path", PATHS)
async def test_invalid_priority_is_named(client: httpx.AsyncClient, path: str) -> None:
    reply = await post(client, path, key=None, priority="first")
    assert reply.status_code == 422
    assert [item["loc"] for item in reply.json()["detail"]] == [["body", "priority"]]


async def test_synchronous_routes_ignore_fields_of_jobs(client: httpx.AsyncClient) -> None:
    fields = {"prompt": "x", "duration": 0.1, "webhook_url": "http://10.0.0.1/"}
    assert (await client.post("/v1/audio/generations", json=fields)).status_code == 200
    form = {name: str(value) for name, value in fields.items()}
    assert (await client.post("/v1/audio/variations", data=form, files={"audio": WAV})).status_code == 200
