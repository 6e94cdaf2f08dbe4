"""An upload with an API key that has used up its limits is refused before the body arrives. Uses real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from stable_audio_serve.api.app import create_app
from stable_audio_serve.core.keys import hash_key
from stable_audio_serve.core.settings import Settings
from tests.audio_files import make_audio_file
from tests.backends import ToneBackend
from tests.patience import PATIENCE_S, until
from tests.sockets import listening

pytestmark = [pytest.mark.server, pytest.mark.usefixtures("low_rate")]

KEYS = f"""
alice:{hash_key("alice")} audio-seconds-per-minute=10
bob:{hash_key("bob")} concurrency=1
"""
TEXT, VARIATION, JOB = "/v1/audio/generations", "/v1/audio/variations", "/jobs/variations"
HUGE_BYTES = 50_000_000


@asynccontextmanager
async def two_servers(folder: Path, backend: ToneBackend) -> AsyncIterator[tuple[int, int]]:
    """Run two servers that share a job database. Yields their ports."""
    (folder / "keys").write_text(KEYS)
    tree = {"api": {"key_file": str(folder / "keys")}, "output_dir": str(folder / "outputs")}
    apps = [create_app(backend, Settings.model_validate(tree)) for _ in range(2)]
    async with listening(apps[0], lifespan="on") as one, listening(apps[1], lifespan="on") as other:
        yield one, other


async def send_head(port: int, path: str, key: str) -> bytes:
    """Send only the headers and the first bytes of a huge upload. Returns the whole response."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Type: multipart/form-data; boundary=x\r\nContent-Length: {HUGE_BYTES}\r\n\r\n"
    )
    writer.write(head.encode() + b"--x\r\n")
    await writer.drain()
    async with asyncio.timeout(PATIENCE_S):
        answer = await reader.read()  # until the server closes the connection
    writer.close()
    return answer


async def post(port: int, path: str, key: str, **body: object) -> httpx.Response:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_S) as client:
        return await client.post(path, headers={"Authorization": f"Bearer {key}"}, **body)  # type: ignore[arg-type]


async def test_uploads_above_the_limit_are_refused_by_their_headers(tmp_path: Path) -> None:
    async with two_servers(tmp_path, ToneBackend()) as (one, other):
        assert (await post(one, TEXT, "alice", json={"prompt": "x", "duration": 10})).status_code == 200
        targets = [(port, path) for port in (one, other) for path in (VARIATION, JOB, "/v1/audio/inpaint")]
        answers = await asyncio.gather(*(send_head(port, path, "alice") for port, path in targets))
        for target, answer in zip(targets, answers, strict=True):
            assert answer.startswith(b"HTTP/1.1 429 "), target
            assert b"audio-seconds-per-minute=10" in answer, target
            assert b"connection: close" in answer.lower(), target
            assert b"retry-after: " in answer.lower(), target


async def test_client_that_sends_its_whole_body_gets_the_refusal(tmp_path: Path) -> None:
    async with two_servers(tmp_path, ToneBackend()) as (one, other):
        assert (await post(one, TEXT, "alice", json={"prompt": "x", "duration": 10})).status_code == 200
        files = {"audio": b"\0" * 5_000_000}
        replies = [await post(other, VARIATION, "alice", data={"prompt": "x"}, files=files) for _ in range(5)]
        assert [reply.status_code for reply in replies] == [429] * 5


async def test_concurrency_limit_refuses_uploads_but_no_jobs(tmp_path: Path) -> None:
    backend = ToneBackend()
    backend.released.clear()
    files, form = {"audio": make_audio_file(duration_s=0.5)}, {"prompt": "x", "duration": "1"}
    async with two_servers(tmp_path, backend) as (one, other):
        first = asyncio.create_task(post(one, TEXT, "bob", json={"prompt": "x", "duration": 1}))
        await until(lambda: backend.num_running == 1)
        for answer in await asyncio.gather(*(send_head(port, VARIATION, "bob") for port in (one, other))):
            assert answer.startswith(b"HTTP/1.1 429 ")
            assert b"concurrency=1" in answer
        assert (await post(other, JOB, "bob", data=form, files=files)).status_code == 202
        backend.released.set()
        assert (await first).status_code == 200
        for port in (one, other):
            assert (await post(port, VARIATION, "bob", data=form, files=files)).status_code == 200


async def test_checking_headers_charges_nothing(tmp_path: Path) -> None:
    files = {"audio": make_audio_file(duration_s=0.5)}
    async with two_servers(tmp_path, ToneBackend()) as (one, other):
        for port in (one, other) * 5:  # ten requests for 1 s use up the limit of 10 s
            reply = await post(port, VARIATION, "alice", data={"prompt": "x", "duration": "1"}, files=files)
            assert reply.status_code == 200
        assert (await send_head(other, VARIATION, "alice")).startswith(b"HTTP/1.1 429 ")
