"""fal's storage over HTTP: uploads as fal's Python and JavaScript clients send them, limits, and access control."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from itsdangerous import TimestampSigner, URLSafeTimedSerializer

from stable_audio_serve.artifacts.local import LocalArtifacts
from stable_audio_serve.core.settings import Settings
from stable_audio_serve.jobs.open import open_queue, prepare_stores
from tests.api.compat.serving import make_client, serve_app
from tests.patience import PATIENCE_S

pytestmark = pytest.mark.server

DATA = bytes(range(256)) * 40
KEY = "sas-test"
KEYS = {"api": {"key_hashes": [hashlib.sha256(KEY.encode()).hexdigest()]}}
AUTHORIZED = {"authorization": f"Key {KEY}"}


async def announce(client: httpx.AsyncClient, **body: Any) -> dict[str, str]:
    named = {"file_name": "take.wav", "content_type": "audio/wav"} | body
    reply = await client.post("/storage/upload/initiate?storage_type=fal-cdn-v3", json=named, headers=AUTHORIZED)
    assert reply.status_code == 200, reply.text
    assert reply.json().keys() == {"upload_url", "file_url"}
    return reply.json()


async def check_file(client: httpx.AsyncClient, url: str, data: bytes = DATA, media_type: str = "audio/wav") -> None:
    reply = await client.get(url)
    assert (reply.status_code, reply.content) == (200, data)
    assert reply.headers["content-type"] == media_type
    assert reply.headers["content-disposition"].startswith("attachment")
    assert reply.headers["x-content-type-options"] == "nosniff"


async def test_token_is_the_callers_key(client: httpx.AsyncClient) -> None:
    reply = await client.post("/storage/auth/token?storage_type=fal-cdn-v3", json={}, headers=AUTHORIZED)
    body = reply.json()
    assert (body["token"], body["token_type"], body["base_url"]) == (KEY, "Key", "http://localhost")
    assert datetime.fromisoformat(body["expires_at"]) > datetime.now(UTC)
    body = (await client.post("/storage/auth/token", json={}, headers={"xi-api-key": KEY})).json()
    assert (body["token"], body["token_type"]) == (KEY, "Bearer")
    bare = (await client.post("/storage/auth/token", json={})).json()
    assert bare["token"]
    assert bare["token_type"]


async def test_upload_in_one_request_is_stored(client: httpx.AsyncClient) -> None:
    headers = {"content-type": "audio/wav", "x-fal-file-name": "take 1.wav"}
    reply = await client.post("/files/upload", content=DATA, headers=headers)
    assert reply.json().keys() == {"access_url"}
    assert reply.json()["access_url"].endswith("/take_1.wav")
    await check_file(client, reply.json()["access_url"])


async def test_announced_upload_is_stored(client: httpx.AsyncClient) -> None:
    place = await announce(client)
    assert (await client.get(place["file_url"])).status_code == 404
    assert (await client.put(place["upload_url"], content=DATA)).status_code == 200
    await check_file(client, place["file_url"])


async def test_repeated_upload_is_accepted_and_a_different_one_refused(client: httpx.AsyncClient) -> None:
    place = await announce(client)
    for _ in range(2):
        assert (await client.put(place["upload_url"], content=DATA)).status_code == 200
    reply = await client.put(place["upload_url"], content=b"other")
    assert (reply.status_code, type(reply.json()["detail"])) == (400, str)
    await check_file(client, place["file_url"])


@pytest.mark.parametrize("path", ["/storage/upload/initiate", "/fal/storage/upload/initiate"])
async def test_announcement_without_a_body_is_an_error(client: httpx.AsyncClient, path: str) -> None:
    reply = await client.post(path)
    assert (reply.status_code, reply.json()["detail"][0]["loc"]) == (422, ["body"])


@pytest.mark.parametrize(
    ("name", "media_type", "shown", "served"),
    [
        ("../../etc/passwd", "audio/wav", "etc_passwd", "audio/wav"),
        ("<script>.html", "text/html\r\nx: y", "script_.html", "application/octet-stream"),
        ("ギター.mp3", "audio/mpeg", "upload.mp3", "audio/mpeg"),
        ("_passwd", "audio/wav", "passwd", "audio/wav"),
        ("...", "nonsense", "upload.bin", "application/octet-stream"),
        ("Gitarre ♫.mp3", "audio/mpeg; codecs=mp3", "Gitarre_.mp3", "audio/mpeg; codecs=mp3"),
        *(
            ("a.b", media_type, "a.b", "application/octet-stream")
            for media_type in ("text/javascript", "text/html", "image/svg+xml", "image/png", "audio/x+xml", "text/css")
        ),
        (None, None, "upload.bin", "application/octet-stream"),
        ("x" * 5000 + ".wav", "audio/wav", None, "audio/wav"),
    ],
)
async def test_file_names_and_types_are_sanitized(
    client: httpx.AsyncClient, name: str | None, media_type: str | None, shown: str | None, served: str
) -> None:
    place = await announce(client, file_name=name, content_type=media_type)
    if shown:
        assert place["file_url"].rpartition("/")[2] == shown
    assert (await client.put(place["upload_url"], content=DATA)).status_code == 200
    await check_file(client, place["file_url"], media_type=served)


@pytest.mark.parametrize("ticket", ["x", "a.b.c", "W10.aaaa.bbbb", "x" * 5000])
async def test_unknown_upload_url_is_refused(client: httpx.AsyncClient, ticket: str) -> None:
    assert (await client.put(f"/storage/upload/{ticket}", content=DATA)).status_code in (403, 404, 405)


async def test_long_ticket_is_refused_quickly(client: httpx.AsyncClient) -> None:
    started_at = time.thread_time()
    reply = await client.put(f"/storage/upload/{'a.' * 30_000}/", content=DATA)
    assert reply.status_code == 404
    assert time.thread_time() - started_at < 2  # CPU seconds; a quadratic search would take far longer


async def test_upload_above_the_limit_is_413_while_it_arrives() -> None:
    async def stream() -> AsyncIterator[bytes]:
        for _ in range(5):
            yield bytes(100_000)

    async with (
        serve_app(api={"max_upload_bytes": 200_000}) as (port, _),
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_S) as client,
    ):
        place = await announce(client)
        assert (await client.put(place["upload_url"], content=bytes(200_001))).status_code == 413
        assert (await client.put(place["upload_url"], content=bytes(200_000))).status_code == 200
        reply = await client.post("/files/upload", content=stream())
        assert (reply.status_code, "200000 bytes" in reply.json()["detail"]) == (413, True)


async def test_announced_urls_need_no_key(client: httpx.AsyncClient) -> None:
    other = httpx.URL((await announce(client))["upload_url"]).path  # signed by another server
    async with make_client(**KEYS) as (client, _):
        assert (await client.put(other, content=DATA)).status_code == 403
        for path in ("/storage/auth/token", "/storage/upload/initiate", "/files/upload"):
            assert (await client.post(path, json={})).status_code == 401
        place = await announce(client)
        assert (await client.put(place["upload_url"], content=DATA)).status_code == 200
        await check_file(client, place["file_url"])
        token = (await client.post("/storage/auth/token", json={}, headers=AUTHORIZED)).json()
        headers = {"authorization": f"{token['token_type']} {token['token']}", "content-type": "audio/wav"}
        reply = await client.post("/files/upload", content=DATA, headers=headers)
        await check_file(client, reply.json()["access_url"])


async def upload_everywhere(client: httpx.AsyncClient, ticket: str) -> list[httpx.Response]:
    """Send an upload with this ticket to every upload route that takes a ticket. Returns the responses."""
    return [await client.put(f"{prefix}/storage/upload/{ticket}", content=DATA) for prefix in ("", "/fal")]


async def test_damaged_tickets_are_refused(client: httpx.AsyncClient) -> None:
    ticket = (await announce(client))["upload_url"].rpartition("/")[2]
    payload, _, rest = ticket.partition(".")
    for damaged in (f"{payload}x.{rest}", f".{ticket}", ticket[:-1], f"{payload}.", "!.!", "%FF.x", f"{'x' * 9000}.x"):
        assert {reply.status_code for reply in await upload_everywhere(client, damaged)} <= {403, 404}, damaged[:80]


async def test_without_keys_urls_of_other_servers_are_refused(client: httpx.AsyncClient) -> None:
    ticket = {"file_id": "0" * 32, "file_name": "take.wav", "media_type": "audio/wav"}
    options = {"salt": "fal-upload", "signer_kwargs": {"digest_method": hashlib.sha256}}
    forged = [URLSafeTimedSerializer("", **options).dumps(ticket)]
    async with make_client() as (other, _):
        for ticket in [*forged, httpx.URL((await announce(other))["upload_url"]).path.rpartition("/")[2]]:
            assert {reply.status_code for reply in await upload_everywhere(client, ticket)} == {403}


@pytest.mark.parametrize("settings", [{}, KEYS], ids=["open", "with keys"])
async def test_every_process_of_an_installation_accepts_the_urls(tmp_path: Path, settings: dict[str, Any]) -> None:
    settings = settings | {"output_dir": str(tmp_path)}
    async with make_client(**settings) as (first, _), make_client(**settings) as (second, _):
        place, later = await announce(first), await announce(first)
        assert (await second.put(place["upload_url"], content=DATA)).status_code == 200
        await check_file(first, place["file_url"])
    async with make_client(**settings) as (again, _):
        assert (await again.put(later["upload_url"], content=DATA)).status_code == 200
    other_keys = {"api": {"key_hashes": [hashlib.sha256(b"other").hexdigest()]}}
    async with make_client(**settings | other_keys) as (client, _):
        assert (await client.put(later["upload_url"], content=DATA)).status_code == 403


@pytest.mark.parametrize(("signed_before_s", "status"), [(-120, 200), (86_300, 200), (86_500, 403)])
async def test_urls_are_valid_for_a_day_also_if_clocks_differ(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, signed_before_s: int, status: int
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(TimestampSigner, "get_timestamp", lambda _: int(time.time()) - signed_before_s)
        place = await announce(client)
    assert (await client.put(place["upload_url"], content=DATA)).status_code == status


@pytest.mark.parametrize("is_in_file", [False, True], ids=["configured", "in the key file"])
async def test_removing_a_key_revokes_its_upload_urls(tmp_path: Path, is_in_file: bool) -> None:
    lines = [hashlib.sha256(key.encode()).hexdigest() for key in (KEY, "other")]
    key_file = tmp_path / "keys"

    def keep(digests: list[str]) -> dict[str, Any]:
        key_file.write_text("".join(f"{digest}\n" for digest in digests))
        api = {"key_file": str(key_file)} if is_in_file else {"key_hashes": digests}
        return {"output_dir": str(tmp_path / "out"), "api": api}

    async with make_client(**keep(lines)) as (client, _):
        place = await announce(client)
        assert (await client.put(place["upload_url"], content=DATA)).status_code == 200
    async with make_client(**keep(lines[1:])) as (client, _):
        assert {reply.status_code for reply in await upload_everywhere(client, _ticket_of(place))} == {403}
    async with make_client(output_dir=str(tmp_path / "out")) as (client, _):  # this server has no API keys
        assert {reply.status_code for reply in await upload_everywhere(client, _ticket_of(place))} == {403}


def _ticket_of(place: dict[str, str]) -> str:
    return httpx.URL(place["upload_url"]).path.rpartition("/")[2]


def _room_for(num_files: float) -> dict[str, Any]:
    digests = [f"{name}:{hashlib.sha256(key.encode()).hexdigest()}" for name, key in (("a", KEY), ("b", "other"))]
    return {"api": {"key_hashes": digests}, "storage": {"max_bytes_per_key": int(num_files * len(DATA))}}


async def test_client_cannot_exceed_its_storage_limit() -> None:
    async with make_client(**_room_for(2.5)) as (client, _):
        places = [await announce(client) for _ in range(3)]
        for place, status in zip(places, (200, 200, 507), strict=True):
            for _ in range(2):  # uploading the same file again uses no more quota
                reply = await client.put(place["upload_url"], content=DATA)
                assert reply.status_code == status
        assert "storage.max_bytes_per_key" in reply.json()["detail"]
        assert (await client.get(places[2]["file_url"])).status_code == 404
        refused = await client.post("/files/upload", content=DATA, headers=AUTHORIZED)
        assert refused.status_code == 507
        other = await client.post("/files/upload", content=DATA, headers={"authorization": "Key other"})
        assert other.status_code == 200


async def test_upload_that_breaks_off_while_it_is_stored_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    is_storing = asyncio.Event()

    async def hang(*_: Any, **__: Any) -> None:
        is_storing.set()
        await asyncio.Event().wait()

    async with make_client(**_room_for(1.5)) as (client, _):
        place = await announce(client)
        with monkeypatch.context() as patch:
            patch.setattr(LocalArtifacts, "put", hang)
            sending = asyncio.create_task(client.put(place["upload_url"], content=DATA))
            async with asyncio.timeout(PATIENCE_S):
                await is_storing.wait()
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
        assert (await client.put(place["upload_url"], content=DATA)).status_code == 200


def stored_sizes(folder: Path) -> list[int]:
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return [size for size in sizes if size == len(DATA)]


async def test_concurrent_uploads_to_one_url_store_and_count_one_file(tmp_path: Path) -> None:
    settings = _room_for(5.5) | {"output_dir": str(tmp_path)}
    async with make_client(**settings) as (client, _):
        place = await announce(client)
        others = [bytes([n]) * len(DATA) for n in range(3)]
        sent = [client.put(place["upload_url"], content=content) for content in (*others, others[0])]
        replies = await asyncio.gather(*sent)
        assert {reply.status_code for reply in replies} == {200, 400}
        winner = (await client.get(place["file_url"])).content
        accepted = [reply.status_code == 200 for reply in replies]
        assert accepted == [content == winner for content in (*others, others[0])]
        assert len(stored_sizes(tmp_path)) == 1
        uploads = [await client.post("/files/upload", content=DATA, headers=AUTHORIZED) for _ in range(5)]
        assert [reply.status_code for reply in uploads] == [200] * 4 + [507]  # the fifth would exceed 5.5 files


async def test_expired_files_no_longer_count() -> None:
    async with make_client(**_room_for(1), jobs={"retention_s": 0.05}) as (client, _):
        for _ in range(2):
            assert (await client.post("/files/upload", content=DATA, headers=AUTHORIZED)).status_code == 200
            await asyncio.sleep(0.1)


async def test_signing_secret_is_not_stored_with_the_files(tmp_path: Path) -> None:
    settings = Settings(output_dir=str(tmp_path))
    identity = prepare_stores(settings).identity
    jobs = open_queue(settings)
    secret = jobs.store.secret()
    await jobs.close()
    assert (len(secret), secret == identity) == (64, False)
    found = await asyncio.to_thread(lambda: list(tmp_path.rglob("*")))
    kept = [path for path in found if path.is_file() and ".db" not in path.name]
    assert any(identity.encode() in path.read_bytes() for path in kept)
    assert not any(secret.encode() in path.read_bytes() for path in kept)


async def test_json_bodies_have_the_small_limit() -> None:
    async with make_client() as (client, _):
        reply = await client.post("/storage/upload/initiate", json={"file_name": "x" * 1_100_000})
        assert reply.status_code == 413
        reply = await client.post("/fal-ai/stable-audio", json={"prompt": "x" * 1_100_000})
        assert (reply.status_code, "body" in reply.json()["detail"]) == (413, True)
