"""Admin routes: authorization, responses, and what a drained server still serves."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI

from stable_audio_serve.core.errors import StorageError
from stable_audio_serve.core.keys import hash_key
from stable_audio_serve.core.operations import DrainReport, ServerReport
from tests.api.compat.serving import make_app
from tests.api.test_draining import BODY, GENERATE
from tests.audio_files import make_audio_file
from tests.backends import ToneBackend
from tests.jobs.stores import ERROR
from tests.patience import PATIENCE_S, until

ADMIN = {"Authorization": "Bearer admin"}
PLAIN = {"Authorization": "Bearer plain"}
LETTERS = "/v1/admin/dead-letters"


class RecordingOperations:
    """The server's admin operations: each records its call, or raises `error` if that is set."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, ...]] = []
        self.error: Exception | None = None

    async def report(self) -> ServerReport:
        return ServerReport({}, DrainReport("draining", 1, 1) if ("drain",) in self.calls else DrainReport())

    async def keep(self, model: str) -> None:
        self._record("keep", model)

    async def release(self, model: str) -> None:
        self._record("release", model)

    async def drain(self) -> None:
        self._record("drain")

    async def resume(self) -> None:
        self._record("resume")

    def _record(self, *call: str) -> None:
        if self.error is not None:
            raise self.error
        self.calls.append(call)


@asynccontextmanager
async def make_admin(
    backend: ToneBackend | None = None, **options: Any
) -> AsyncIterator[tuple[httpx.AsyncClient, FastAPI]]:
    """Yield a client and its application. The client sends a key with the scope `admin`.

    The headers `PLAIN` have a valid key without this scope.
    """
    with tempfile.TemporaryDirectory() as folder:
        keys = Path(folder) / "keys"
        keys.write_text(f"root:{hash_key('admin')} scope=admin\nstudio:{hash_key('plain')}\n")
        keys.chmod(0o600)
        async with make_app(backend, api={"key_file": str(keys)}, **options) as (app, _):
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost", headers=ADMIN) as client:
                yield client, app


async def submit(client: httpx.AsyncClient, source: bytes | None = None) -> dict[str, Any]:
    """Submit a job, with an upload if `source` is given. Returns the response's JSON."""
    if source is None:
        reply = await client.post("/jobs", json=BODY, headers=PLAIN)
    else:
        reply = await client.post("/jobs/variations", data=BODY, files={"audio": ("a.wav", source)}, headers=PLAIN)
    assert reply.status_code == 202
    ticket: dict[str, Any] = reply.json()
    return ticket


async def test_without_keys_admin_routes_are_refused() -> None:
    async with make_app() as (app, _):
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            for method, path in (("POST", "/v1/admin/drain"), ("GET", LETTERS)):
                reply = await client.request(method, path)
                assert reply.status_code == 403
                assert "no keys are configured" in reply.json()["detail"]


async def test_models_can_be_loaded_by_any_of_their_names() -> None:
    calls = RecordingOperations()
    async with make_admin(operations=calls) as (client, _):
        for name in ("medium", "stabilityai%2Fstable-audio-3-medium", "stabilityai/stable-audio-3-medium"):
            reply = await client.post(f"/v1/admin/models/{name}/load")
            assert (reply.status_code, reply.json()["model"], reply.json()["kept"]) == (202, "medium", True)
        reply = await client.post("/v1/admin/models/medium/unload")
        assert (reply.status_code, reply.json()["kept"]) == (200, False)
        reply = await client.post("/v1/admin/models/nothing/load")
        assert reply.status_code == 404
        assert "medium" in reply.json()["detail"]
    assert calls.calls == [("keep", "medium")] * 3 + [("release", "medium")]


async def test_unloading_below_the_configured_minimum_is_refused() -> None:
    calls = RecordingOperations()
    models = [{"name": "medium", "replicas": {"min_replicas": 2, "max_replicas": 2}}, {"name": "small-sfx"}]
    async with make_admin(operations=calls, models=models, preload_models=["small-sfx"]) as (client, _):
        for name, least in (("medium", 2), ("small-sfx", 1)):
            reply = await client.post(f"/v1/admin/models/{name}/unload")
            assert reply.status_code == 409
            assert f"keeps {least} of this model" in reply.json()["detail"]
    assert not calls.calls


async def test_unreachable_ray_head_is_503() -> None:
    calls = RecordingOperations()
    calls.error = StorageError("Ray's head does not answer")
    async with make_admin(operations=calls) as (client, _):
        reply = await client.post("/v1/admin/models/medium/load")
    assert reply.status_code == 503
    assert "head does not answer" in reply.json()["detail"]
    assert int(reply.headers["retry-after"]) >= 1


async def test_drained_server_finishes_its_requests_and_can_resume() -> None:
    backend = ToneBackend()
    backend.released.clear()
    async with make_admin(backend, run_jobs=False) as (client, _):
        job = await submit(client)
        busy = asyncio.create_task(client.post(GENERATE, json=BODY, headers=PLAIN))
        await until(lambda: backend.num_running == 1)
        reply = await client.post("/v1/admin/drain")
        assert (reply.status_code, reply.json()["state"], reply.json()["requests"]) == (202, "draining", 1)
        refused = await client.post(GENERATE, json=BODY, headers=PLAIN)
        assert (refused.status_code, int(refused.headers["retry-after"]) >= 1) == (503, True)
        assert "operator" in refused.json()["detail"]
        assert (await client.get("/ready")).status_code == 503
        assert (await client.get("/ready")).json()["status"] == "draining"
        read = await client.get(f"/jobs/{job['id']}", headers=PLAIN)
        assert read.json()["status"] == "queued"
        following = await asyncio.wait_for(client.get(f"/jobs/{job['id']}/events", headers=PLAIN), PATIENCE_S)
        assert "retry: " in following.text  # asks the client to reconnect, so another server process can continue
        assert (await client.get("/v1/status")).json()["draining"]["requests"] == 1
        backend.released.set()
        assert (await busy).status_code == 200
        status = (await client.get("/v1/status")).json()
        assert (status["draining"]["state"], status["status"], status["ready"]) == ("drained", "draining", False)
        assert (await client.delete("/v1/admin/drain")).json() == {"state": "no", "requests": 0, "jobs": 0}
        assert (await client.get("/ready")).status_code == 200
        assert (await client.post(GENERATE, json=BODY, headers=PLAIN)).status_code == 200


async def test_drain_and_resume_do_not_undo_a_stop() -> None:
    async with make_admin() as (client, app):
        app.state.draining.stop()
        for method in ("POST", "DELETE"):
            await client.request(method, "/v1/admin/drain")
            assert (await client.get("/jobs", headers=PLAIN)).status_code == 503
        assert (await client.get("/ready")).status_code == 503


async def give_up_job(client: httpx.AsyncClient, app: FastAPI, source: bytes | None = None) -> dict[str, Any]:
    ticket = await submit(client, source)
    store = app.state.jobs.store
    leased = store.runners.lease("a runner", lease_s=60)
    assert store.runners.fail(leased, ERROR, is_dead_letter=True) is not None
    return ticket


async def test_dead_letters_are_listed_shown_retried_once_and_deleted() -> None:
    async with make_admin(run_jobs=False) as (client, app):
        tickets = [await give_up_job(client, app) for _ in range(3)]
        page = (await client.get(LETTERS, params={"limit": 2})).json()
        assert [letter["id"] for letter in page["dead_letters"]] == [ticket["id"] for ticket in tickets[:0:-1]]
        rest = (await client.get(LETTERS, params={"cursor": page["next_cursor"]})).json()
        assert ([letter["id"] for letter in rest["dead_letters"]], rest["next_cursor"]) == ([tickets[0]["id"]], None)
        assert (await client.get(LETTERS, params={"model": "none"})).json()["dead_letters"] == []
        numbers = [letter["number"] for letter in page["dead_letters"] + rest["dead_letters"]]
        shown = (await client.get(f"{LETTERS}/{numbers[0]}")).json()
        assert (shown["id"], shown["client"], shown["attempts"]) == (tickets[2]["id"], "studio", 1)
        assert shown["error"] == {"code": ERROR.code, "message": ERROR.message}
        assert [event["stage"] for event in shown["events"]][:2] == ["queued", "started"]
        body = {"numbers": [numbers[0], numbers[0], 999]}
        assert (await client.post(f"{LETTERS}/retry", json=body)).json() == {"done": [numbers[0]], "not_found": [999]}
        again = (await client.post(f"{LETTERS}/retry", json=body)).json()
        assert again == {"done": [], "not_found": sorted({numbers[0], 999})}
        job = (await client.get(f"/jobs/{tickets[2]['id']}", headers=PLAIN)).json()
        assert (job["status"], job["attempts"]) == ("queued", 0)
        gone = await client.get(f"{LETTERS}/{numbers[0]}")
        assert (gone.status_code, gone.json()["detail"]) == (404, f"no dead letter has the number {numbers[0]}")
        deleted = (await client.post(f"{LETTERS}/delete", json={"numbers": numbers})).json()
        assert deleted == {"done": sorted(numbers[1:]), "not_found": [numbers[0]]}
        assert (await client.get(f"/jobs/{tickets[0]['id']}", headers=PLAIN)).status_code == 404
        assert (await client.get(LETTERS)).json() == {"dead_letters": [], "next_cursor": None}


async def test_deleted_dead_letters_leave_no_uploads(tmp_path: Path) -> None:
    source = make_audio_file(duration_s=0.1)
    async with make_admin(run_jobs=False, output_dir=str(tmp_path)) as (client, app):
        for _ in range(9):
            await give_up_job(client, app, source)
        assert len([*(tmp_path / "uploads").iterdir()]) == 9
        numbers = [letter["number"] for letter in (await client.get(LETTERS)).json()["dead_letters"]]
        deleted = await client.post(f"{LETTERS}/delete", json={"numbers": numbers})
        assert sorted(deleted.json()["done"]) == sorted(numbers)
        assert [*(tmp_path / "uploads").iterdir()] == []


async def test_number_that_is_too_long_is_no_dead_letter() -> None:
    async with make_admin() as (client, _):
        for method in ("GET", "POST"):
            reply = await client.request(method, f"/v1/admin/dead-letters/{'1' * 5000}", headers={"authorization": ""})
            assert reply.status_code == 404


async def test_invalid_numbers_and_page_parameters_are_named() -> None:
    async with make_admin(run_jobs=False) as (client, _):
        for numbers in ([], [1] * 501, ["x"], [2**63], [-(2**70)], None, {"a": 1}):
            reply = await client.post(f"{LETTERS}/retry", json={"numbers": numbers})
            assert reply.status_code == 422, numbers
            assert "numbers" in reply.json()["detail"][0]["loc"], numbers
        for query in ("limit=0", "limit=501", "limit=x", "cursor=-1", f"cursor={'9' * 20}", f"model={'x' * 65}"):
            reply = await client.get(f"{LETTERS}?{query}")
            assert reply.status_code == 422, query
            assert reply.json()["detail"][0]["loc"] == ["query", query.partition("=")[0]]
