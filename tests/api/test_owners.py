"""Ownership of jobs. Each route is called without a key and with three keys: invalid, another client's, the owner's.

The routes are read from the application. The tests fail for a new route until its path parameters are listed here.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
from fastapi import FastAPI
from fastapi.routing import iter_route_contexts

from stable_audio_serve.api.app import create_app
from stable_audio_serve.core.keys import hash_key
from stable_audio_serve.core.settings import Settings
from stable_audio_serve.jobs.open import open_queue
from stable_audio_serve.jobs.queue import JobQueue
from tests.api.compat.serving import make_client
from tests.api.prefixes import PATTERN
from tests.api.test_jobs import wait
from tests.backends import ToneBackend

pytestmark = pytest.mark.server

# Routes that need no key: the start page and its files, the API description, health checks, and download links.
OPEN = {
    *(("GET", path) for path in ("/", "/health", "/ready", "/files/{file_id}/{file_name}")),
    *(("HEAD", path) for path in ("/", "/health", "/ready", "/files/{file_id}/{file_name}")),
    ("GET", "/playground/{path}"),
    *(("GET", path) for path in ("/api/openapi/queue/openapi.json", "/models/{endpoint_id}/llms.txt")),
    *(("GET", path) for path in ("/docs", "/docs/assets/{file_name}", "/redoc", "/openapi.json", "/llms.txt")),
    ("PUT", "/storage/upload/{ticket}"),
}
# This route needs a key only if the client chose the job's id.
AUDIO = "/jobs/{job_id}/audio"

# JOB_NAMES: parameters that take a job id -> the API of the job. OTHER_NAMES: values for the other path parameters.
JOB_NAMES = {"job_id": "sa3", "request_id": "fal", "generation_id": "aiml", "id": "stability"}
OTHER_NAMES = {"file_id": "0" * 32, "file_name": "a.wav", "ticket": "a.b", "number": "1", "endpoint": "x"}
OTHER_NAMES |= {"app": "stable-audio-3", "endpoint_id": "fal-ai/stable-audio"}
OTHER_NAMES |= {"model": "small-sfx", "report_id": "0" * 32, "path": "main.js"}

ALICE, BOB = "alice-1", "bob-1"
HASHES = [f"alice:{hash_key(ALICE)}", f"alice:{hash_key('alice-2')}", f"bob:{hash_key(BOB)}", hash_key("unnamed")]
BODY = {"prompt": "x", "duration": 1, "steps": 2, "seconds_total": 1, "music_length_ms": 3000}  # of all APIs
MISSING = {"sa3": "e" * 32, "stability": "e" * 64}
MISSING |= dict.fromkeys(("fal", "aiml"), "00000000-0000-4000-8000-000000000000")


@dataclass(frozen=True)
class Route:
    """A route and how to call it. `contract` is the API of the job that the request names, None if it names no job."""

    method: str
    path: str
    contract: str | None
    is_query: bool

    def __str__(self) -> str:
        return f"{self.method} {self.path}"

    @property
    def is_open(self) -> bool:
        return (self.method, _without_prefix(self.path)) in OPEN

    @property
    def is_audio(self) -> bool:
        return self.path.endswith(AUDIO)

    def request(self, job_id: str) -> dict[str, Any]:
        names = {**OTHER_NAMES, **dict.fromkeys(JOB_NAMES, job_id)}
        url = re.sub(r"{(\w+)}", lambda match: names[match[1]], self.path)
        query = {"params": {"generation_id": job_id}} if self.is_query else {}
        body = {"json": BODY} if self.method in ("POST", "PUT") else {}
        return {"method": self.method, "url": url, **query, **body}


def _without_prefix(path: str) -> str:
    return re.sub(rf"^{PATTERN}(?=/)", "", path)


def routes_of(app: FastAPI) -> Iterator[Route]:
    """Yield every route with every method. Fails if a path parameter is in neither JOB_NAMES nor OTHER_NAMES."""
    for found in iter_route_contexts(app.routes):
        path = re.sub(r"{(\w+):\w+}", r"{\1}", found.path or "")
        in_path = re.findall(r"{(\w+)}", path)
        in_query = [name for name in JOB_NAMES if name in {one.name for one in found.dependant.query_params}]
        unknown = set(in_path) - JOB_NAMES.keys() - OTHER_NAMES.keys()
        assert not unknown, f"{path}: say in this test what {unknown} name"
        (contract,) = [JOB_NAMES[name] for name in (*in_path, *in_query) if name in JOB_NAMES] or [None]
        yield from (Route(method, path, contract, bool(in_query)) for method in sorted(found.methods or ()))


ROUTES = sorted(set(routes_of(create_app(ToneBackend(), Settings()))), key=str)
OWNED = [route for route in ROUTES if route.contract]


@dataclass
class Site:
    """An application with API keys. It runs no jobs, so they stay queued."""

    client: httpx.AsyncClient
    jobs: JobQueue
    statements: list[str] = field(default_factory=list)
    num_jobs: int = 0

    async def ask(self, route: Route, key: str | None, job_id: str) -> httpx.Response:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return await self.client.request(**route.request(job_id), headers=headers)

    async def submit(self, contract: str | None, key: str = ALICE) -> str:
        """Submit a job of an API (`contract`; None: the native API) with this key. Returns the job's id."""
        self.num_jobs += 1
        headers = {"Authorization": f"Bearer {key}"}
        if contract == "fal":
            reply = await self.client.post("/queue/fal-ai/stable-audio", json={"prompt": "x"}, headers=headers)
            return str(reply.json()["request_id"])
        if contract == "stability":
            path = "/v2beta/audio/stable-audio/text-to-audio"
            reply = await self.client.post(path, data={"prompt": "x"}, headers=headers)
            return str(reply.json()["id"])
        if contract == "aiml":
            body = {"model": "stable-audio", "prompt": "x"}
            reply = await self.client.post("/v2/generate/audio", json=body, headers=headers)
            return str(reply.json()["id"])
        reply = await self.client.put(f"/jobs/{self.num_jobs:032x}", json=BODY, headers=headers)
        return str(reply.json()["id"])

    def forget_jobs(self) -> None:
        with self.jobs.store.database.writing() as connection:
            connection.execute(sa.text("DELETE FROM jobs"))


@pytest.fixture(scope="module")
def app_and_jobs(tmp_path_factory: pytest.TempPathFactory) -> tuple[FastAPI, JobQueue]:
    folder = str(tmp_path_factory.mktemp("owners"))
    settings = Settings.model_validate({"api": {"key_hashes": HASHES}, "output_dir": folder})
    jobs = open_queue(settings)
    return create_app(ToneBackend(), settings, jobs=jobs), jobs


@pytest.fixture
async def site(app_and_jobs: tuple[FastAPI, JobQueue]) -> AsyncIterator[Site]:
    app, jobs = app_and_jobs
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        site = Site(client, jobs)
        engine = jobs.store.database.engine

        def record(_c: Any, _cursor: Any, statement: str, *_: Any) -> None:
            site.statements.append(statement)

        sa.event.listen(engine, "before_cursor_execute", record)
        yield site
        sa.event.remove(engine, "before_cursor_execute", record)
        site.forget_jobs()


def observable(reply: httpx.Response, job_id: str) -> tuple[object, ...]:
    """Returns what a client can see of a response, except values that differ even between equal requests."""
    headers = {name: value for name, value in reply.headers.items() if name not in ("x-request-id", "date")}
    text = reply.text.replace(reply.headers["x-request-id"], "REQUEST")
    return reply.status_code, str(headers).replace(job_id, "ID"), text.replace(job_id, "ID")


def test_there_are_routes_of_each_kind() -> None:
    assert len(OWNED) >= 30
    assert sum(route.is_open for route in ROUTES) >= 20
    assert {route.contract for route in OWNED} == {"sa3", "fal", "aiml", "stability"}
    assert {_without_prefix(route.path) for route in OWNED if route.is_audio} == {AUDIO}


Check = Callable[[Site, Route], Awaitable[None]]


async def failures_at(site: Site, routes: Iterable[Route], check: Check) -> list[str]:
    """Run the check for each route. Returns a message for each failure."""
    failures = []
    for route in routes:
        try:
            await check(site, route)
        except AssertionError as error:
            failures.append(f"{route}: {error}")
    return failures


def assert_asks_for_a_key(reply: httpx.Response) -> None:
    """Check the headers of a response with status 401."""
    if reply.status_code == 401:
        assert reply.headers["www-authenticate"] == "Bearer"
        assert reply.headers["content-type"] == "application/json"


async def test_without_a_valid_key_existing_and_missing_jobs_look_the_same(site: Site) -> None:
    async def check(site: Site, route: Route) -> None:
        job_id, missing = await site.submit(route.contract), MISSING[route.contract or "sa3"]
        for key in (None, "bad"):
            reply = await site.ask(route, key, job_id)
            assert reply.status_code == (404 if route.is_audio else 401)
            assert_asks_for_a_key(reply)
            assert observable(reply, job_id) == observable(await site.ask(route, key, missing), missing)

    assert not await failures_at(site, OWNED, check)


async def test_job_of_another_client_looks_missing(site: Site) -> None:
    async def check(site: Site, route: Route) -> None:
        job_id, missing = await site.submit(route.contract), MISSING[route.contract or "sa3"]
        before = await asyncio.to_thread(lambda: site.jobs.store.operators.find_all(job_id))
        del site.statements[:]
        reply = await site.ask(route, BOB, job_id)
        statements, site.statements[:] = tuple(site.statements), ()
        unknown = await site.ask(route, BOB, missing)
        assert observable(reply, job_id) == observable(unknown, missing)
        assert statements == tuple(site.statements)  # the same SQL, so timing does not show whether the job exists
        after = await asyncio.to_thread(lambda: site.jobs.store.operators.find_all(job_id))
        assert [job for job in after if job.spec.client == "alice"] == before
        site.forget_jobs()

    assert not await failures_at(site, OWNED, check)


async def test_job_is_found_by_each_key_of_its_client(site: Site) -> None:
    async def check(site: Site, route: Route) -> None:
        for key in (ALICE, "alice-2"):
            job_id, missing = await site.submit(route.contract), MISSING[route.contract or "sa3"]
            if route.path.endswith(("/events", "/stream")):  # end the job, because the stream lasts until then
                (job,) = site.jobs.store.operators.find_all(job_id)
                await site.jobs.cancel(job.spec.ref)
            reply = await site.ask(route, key, job_id)
            assert reply.status_code not in (401, 403, 404, 500)
            assert observable(reply, job_id) != observable(await site.ask(route, key, missing), missing)
            site.forget_jobs()

    assert not await failures_at(site, OWNED, check)


async def test_routes_without_owner_are_the_same_for_every_valid_key(site: Site) -> None:
    async def check(site: Site, route: Route) -> None:
        replies = [await site.ask(route, key, "") for key in (None, "bad", ALICE, BOB, "unnamed")]
        without, bad, *good = [reply.status_code for reply in replies]
        for reply in replies[:2]:
            assert_asks_for_a_key(reply)
        assert len(set(good)) == 1
        assert good[0] not in (401, 500)
        assert {without, bad} == ({good[0]} if route.is_open else {401})

    assert not await failures_at(site, [route for route in ROUTES if not route.contract], check)


async def test_chosen_id_of_one_client_is_free_for_another(site: Site) -> None:
    url = f"/jobs/{'a' * 32}"
    headers = [{"Authorization": f"Bearer {key}"} for key in (ALICE, BOB, "unnamed")]
    for number, each in enumerate(headers):
        reply = await site.client.put(url, json=BODY | {"seed": number}, headers=each)
        assert (reply.status_code, "idempotent-replayed" in reply.headers) == (202, False)
    assert (await site.client.delete(url, headers=headers[0])).json()["status"] == "cancelled"
    assert [(await site.client.get(url, headers=each)).json()["status"] for each in headers[1:]] == ["queued"] * 2
    lists = [(await site.client.get("/jobs", headers=each)).json()["jobs"] for each in headers]
    assert [[job["status"] for job in jobs] for jobs in lists] == [["cancelled"], ["queued"], ["queued"]]
    assert sorted(job.spec.client for job in site.jobs.store.operators.find_all("a" * 32)) == sorted(
        ["alice", "bob", hash_key("unnamed")[:16]]
    )


async def test_files_of_equal_chosen_ids_belong_to_each_client() -> None:
    async with make_client(api={"key_hashes": HASHES}) as (client, _):
        url, found = f"/jobs/{'b' * 32}", {}
        for key in (ALICE, BOB):
            client.headers["Authorization"] = f"Bearer {key}"
            assert (await client.put(url, json=BODY | {"duration": 1 + len(found)})).status_code == 202
            found[key] = await wait(client, {"status_url": url})
        sizes = {}
        for key, status in found.items():
            client.headers["Authorization"] = f"Bearer {key}"
            audio = await client.get(f"{url}/audio")
            del client.headers["Authorization"]
            assert (await client.get(f"{url}/audio")).status_code == 404
            assert re.search(r"/files/[0-9a-f]{32}/[^/]+\.wav$", status["download_url"])
            link = await client.get(status["download_url"])
            assert (link.status_code, link.content) == (200, audio.content)
            sizes[key] = len(audio.content)
        assert sizes[BOB] > 1.9 * sizes[ALICE]


@pytest.mark.parametrize("prefix", ["", "/sa3"])
async def test_audio_with_an_unguessable_id_can_be_downloaded_without_a_key(prefix: str) -> None:
    async with make_client(api={"key_hashes": HASHES}) as (client, _):
        client.headers["Authorization"] = f"Bearer {ALICE}"
        ticket = (await client.post(f"{prefix}/jobs", json=BODY)).json()
        status = await wait(client, ticket)
        assert status["download_url"] == f"{ticket['status_url']}/audio"
        del client.headers["Authorization"]
        audio = await client.get(status["download_url"])
        assert audio.status_code == 200
        client.headers["Authorization"] = f"Bearer {BOB}"
        await client.put(f"/jobs/{ticket['id']}", json=BODY)  # another client chooses the same id
        del client.headers["Authorization"]
        assert (await client.get(status["download_url"])).content == audio.content


async def test_without_keys_all_callers_are_one_client() -> None:
    async with make_client() as (client, _):
        url = f"/jobs/{'c' * 32}"
        assert (await client.put(url, json=BODY)).status_code == 202
        await wait(client, {"status_url": url})
        assert (await client.get(f"{url}/audio")).status_code == 200
