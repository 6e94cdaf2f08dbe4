"""Uploads over a socket: decoder processes that are killed or hang, many uploads at once, lost connections."""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import httpx
import pytest

from stable_audio_serve.api.middleware.limits import ClientTimes
from stable_audio_serve.audio.decode import AudioDecoder
from stable_audio_serve.core.keys import hash_key
from tests.api.test_connections import connect, open_connection, serve
from tests.audio_files import make_audio_file
from tests.backends import ToneBackend
from tests.patience import PATIENCE_S, until

pytestmark = pytest.mark.server

VARIATIONS = "/v1/audio/variations"
FORM = {"prompt": "x", "duration": "0.1"}
WAV = make_audio_file(duration_s=10.0)


def decoder_pids() -> set[int]:
    """Returns the ids of this process's child processes that decode audio."""
    found = set()
    for entry in Path("/proc").iterdir():
        try:
            stat, command = (entry / "stat").read_text(), (entry / "cmdline").read_bytes()
        except (OSError, ValueError):
            continue
        if b"decode_worker" in command and int(stat.rpartition(")")[2].split()[1]) == os.getpid():
            found.add(int(entry.name))
    return found


def spooled_files(folder: Path) -> list[str]:
    """Returns the files in `folder` that this process has open, including deleted files."""
    links = []
    for entry in Path("/proc/self/fd").iterdir():
        try:
            links.append(os.readlink(entry))
        except OSError:
            continue
    return [link for link in links if link.startswith(str(folder))]


async def upload(client: httpx.AsyncClient, data: bytes = WAV) -> httpx.Response:
    return await client.post(VARIATIONS, data=FORM, files={"audio": ("a.wav", data)})


async def test_killed_decoder_does_not_affect_uploads() -> None:
    before = decoder_pids()
    async with connect(ToneBackend()) as client:
        assert (await upload(client)).status_code == 200
        for during in (False, True, True):
            (pid,) = decoder_pids() - before
            if during:
                os.kill(pid, signal.SIGSTOP)
                asyncio.get_running_loop().call_later(0.2, os.kill, pid, signal.SIGKILL)
            else:
                os.kill(pid, signal.SIGKILL)
            assert (await upload(client)).status_code == 200
    assert decoder_pids() <= before


async def test_hanging_decoder_is_a_400_and_blocks_no_other_upload(monkeypatch: pytest.MonkeyPatch) -> None:
    began_at = time.monotonic()
    with closing(AudioDecoder(timeout_s=PATIENCE_S)) as decoder, tempfile.TemporaryFile() as file:
        file.write(WAV)
        decoder.decode(file, max_s=10.0)
    # The time limit is five times as long as it took to start a decoder process and decode the file.
    limit_s = max(4.0, 5 * (time.monotonic() - began_at))
    monkeypatch.setattr("stable_audio_serve.audio.workers.MAX_DECODE_S", limit_s)
    before = decoder_pids()
    async with connect(ToneBackend()) as client:
        assert (await upload(client)).status_code == 200
        (pid,) = decoder_pids() - before
        os.kill(pid, signal.SIGSTOP)
        async with asyncio.timeout(PATIENCE_S):
            stuck = asyncio.create_task(upload(client))
            await asyncio.sleep(0.2)
            for _ in range(5):
                assert (await client.get("/health")).status_code == 200
            assert not stuck.done()  # /health responded before the decoder's timeout
            reply = await stuck
        assert reply.status_code == 400
        assert reply.json() == {"detail": "audio: decoding the file took too long"}
        assert (await upload(client)).status_code == 200


async def test_twelve_concurrent_uploads_keep_their_own_sources() -> None:
    backend = ToneBackend()
    lengths_s = [0.1 * (index + 1) for index in range(12)]

    async def one(client: httpx.AsyncClient, length_s: float) -> int:
        form = FORM | {"seed": str(round(length_s * 10))}
        files = {"audio": make_audio_file(duration_s=length_s, rate_hz=8000)}
        return (await client.post(VARIATIONS, data=form, files=files)).status_code

    async with connect(backend) as client:
        assert set(await asyncio.gather(*(one(client, length_s) for length_s in lengths_s))) == {200}
    for _, request in backend.requests:
        assert request.init_audio is not None
        assert request.init_audio.samples.shape == (2, request.seed * 800)


@pytest.fixture
def spool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


async def test_uploads_leave_no_files_however_they_end(spool: Path) -> None:
    head = b'--B\r\nContent-Disposition: form-data; name="audio"; filename="a.wav"\r\n\r\n' + bytes(3_000_000)
    headers = "Content-Type: multipart/form-data; boundary=B\r\n"

    async def too_much() -> AsyncIterator[bytes]:
        yield head
        for _ in range(100):
            yield bytes(65536)

    async with (
        serve(ToneBackend(), max_upload_bytes=5_000_000) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_S) as client,
    ):
        assert (await upload(client)).status_code == 200
        assert (await upload(client, b"RIFF----WAVE" + bytes(3_000_000))).status_code == 400
        form = FORM | {"steps": "0"}
        assert (await client.post(VARIATIONS, data=form, files={"audio": WAV})).status_code == 422
        multipart = {"content-type": "multipart/form-data; boundary=B"}
        assert (await client.post(VARIATIONS, content=head, headers=multipart)).status_code in (400, 422)
        assert (await client.post(VARIATIONS, content=too_much(), headers=multipart)).status_code == 413
    async with serve(ToneBackend(), max_upload_bytes=5_000_000, times=ClientTimes(window_s=0.5)) as port:
        for leave in (True, False):
            reader, writer = await open_connection(port, head, path=VARIATIONS, headers=headers, length=4_000_000)
            await until(lambda: bool(spooled_files(spool)))
            if leave:
                writer.transport.abort()
            else:
                assert (await reader.read()).startswith(b"HTTP/1.1 408 ")
                writer.close()
            await until(lambda: not spooled_files(spool))
    assert not spooled_files(spool)
    assert not os.listdir(spool)


async def test_upload_waits_for_one_upload_of_each_other_client_only() -> None:
    slow = make_audio_file(duration_s=60.0, rate_hz=48_000, channels=8, container="FLAC", hz=0.0)
    alice, bob = ({"Authorization": f"Bearer {name}"} for name in ("alice", "bob"))

    async def send(headers: dict[str, str], data: bytes) -> int:
        files = {"audio": ("a.flac", data)}
        return (await client.post(VARIATIONS, data=FORM, files=files, headers=headers)).status_code

    async with connect(ToneBackend(), key_hashes=[hash_key("alice"), hash_key("bob")]) as client:
        assert await send(bob, WAV) == 200  # the decoder has started
        many = [asyncio.create_task(send(alice, slow)) for _ in range(8)]
        done, _ = await asyncio.wait(many, return_when=asyncio.FIRST_COMPLETED)
        assert await send(bob, WAV) == 200
        assert sum(task.done() for task in many) <= len(done) + 3
        assert await asyncio.gather(*many) == [200] * 8


async def test_too_many_body_bytes_are_refused_until_others_are_done() -> None:
    backend = ToneBackend()
    backend.released.clear()
    async with connect(backend, max_bodies_bytes=2 * len(WAV)) as client:
        # A single body may exceed `max_bodies_bytes`.
        first = asyncio.create_task(upload(client, make_audio_file(duration_s=30.0)))
        await until(lambda: backend.num_running == 1)
        second = await upload(client)
        assert (second.status_code, second.headers["retry-after"]) == (503, "5")
        assert second.json() == {
            "detail": "body: too many bytes are being received; retry later (api.max_bodies_bytes)"
        }
        assert (await client.get("/health")).status_code == 200
        assert (await client.post("/v1/audio/generations", json={})).status_code == 422  # bodies up to 1 MiB are read
        backend.released.set()
        assert (await first).status_code == 200
        async with asyncio.timeout(PATIENCE_S):  # the first body is counted until shortly after its response
            while (await upload(client)).status_code != 200:  # noqa: ASYNC110  there is no event to wait for
                await asyncio.sleep(0.05)
