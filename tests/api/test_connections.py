"""What only a real server and real sockets show: gone clients, slow clients, bodies without end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest

from stable_audio_serve.api.app import create_app
from stable_audio_serve.core.settings import Settings
from tests.audio_files import make_audio_file
from tests.backends import ToneBackend
from tests.sockets import listening, wait_until

pytestmark = pytest.mark.slow

URL = "/v1/audio/generations"
_JSON = "Content-Type: application/json\r\n"


@asynccontextmanager
async def connect(
    backend: ToneBackend, *, max_generations: int = 256, **api: object
) -> AsyncIterator[httpx.AsyncClient]:
    async with serve(backend, max_generations=max_generations, **api) as port, httpx.AsyncClient(timeout=10) as client:
        client.base_url = httpx.URL(f"http://127.0.0.1:{port}")
        yield client


@asynccontextmanager
async def serve(backend: ToneBackend, *, max_generations: int = 256, **api: object) -> AsyncIterator[int]:
    """A uvicorn server on a free port of this machine."""
    settings = Settings.model_validate({"api": api, "ingress": {"max_ongoing_requests": max_generations}})
    async with listening(create_app(backend, settings)) as port:
        yield port


async def open_request(
    port: int, body: bytes, *, headers: str = _JSON, length: int | None = None
) -> asyncio.StreamWriter:
    _, writer = await open_connection(port, body, headers=headers, length=length)
    return writer


async def open_connection(
    port: int, body: bytes, *, path: str = URL, headers: str = _JSON, length: int | None = None
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\n{headers}"
    writer.write(f"{head}Content-Length: {len(body) if length is None else length}\r\n\r\n".encode() + body)
    await writer.drain()
    return reader, writer


async def test_a_gone_client_cancels_its_generation() -> None:
    backend = ToneBackend(delay_s=30)
    async with serve(backend) as port:
        writer = await open_request(port, b'{"prompt": "x"}', headers=_JSON + "x-request-disconnect-disabled: ?1\r\n")
        await wait_until(lambda: backend.num_running == 1)
        writer.close()
        await wait_until(lambda: backend.num_running == 0)
    assert backend.num_cancelled == 1


async def test_a_hundred_instant_disconnects_leave_nothing_running() -> None:
    backend = ToneBackend(delay_s=30)
    async with serve(backend) as port:
        for index in range(100):
            writer = await open_request(port, b'{"prompt": "x"}')
            await asyncio.sleep(0.001 * (index % 4))
            writer.transport.abort()
        await wait_until(lambda: backend.num_running == 0)
        assert backend.num_cancelled == len(backend.requests)
        backend.delay_s = 0
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
            assert (await client.post(URL, json={"prompt": "x", "duration": 0.1})).status_code == 200


async def test_one_connection_serves_many_requests() -> None:
    async with connect(ToneBackend()) as client:
        for duration_s in (0.1, 20.0, 0.1):
            reply = await client.post(URL, json={"prompt": "x", "duration": duration_s})
            assert len(reply.content) == 44 + 4 * int(44100 * duration_s)
        assert (await client.post(URL, json={"prompt": ""})).status_code == 422
        assert (await client.get("/health")).status_code == 200


@pytest.mark.parametrize("limits", [{"receive_idle_timeout_s": 0.2}, {"receive_total_timeout_s": 0.2}])
async def test_a_body_that_does_not_arrive_is_408(limits: dict[str, float]) -> None:
    async with serve(ToneBackend(), **limits) as port:
        reader, writer = await open_connection(port, b'{"prom', length=1000)
        async with asyncio.timeout(5):
            reply = await reader.read()  # until the server closes the connection
        writer.close()
    assert reply.startswith(b"HTTP/1.1 408 ")
    assert b'{"detail":"body: did not arrive in time"}' in reply


async def test_a_body_that_trickles_is_ended_by_the_total_time() -> None:
    async with serve(ToneBackend(), receive_idle_timeout_s=0.3, receive_total_timeout_s=0.5) as port:
        reader, writer = await open_connection(port, b"{", length=1000)
        async with asyncio.timeout(5):
            while not reader.at_eof():
                writer.write(b" ")
                try:
                    async with asyncio.timeout(0.05):
                        reply = await reader.readuntil(b"\r\n")
                        break
                except TimeoutError:
                    continue
        writer.close()
    assert reply.startswith(b"HTTP/1.1 408 ")


async def test_a_client_that_stops_reading_does_not_pin_its_answer() -> None:
    backend = ToneBackend()
    async with serve(backend, send_idle_timeout_s=0.3) as port:
        reader, writer = await open_connection(port, b'{"prompt": "x", "duration": 100}')
        await reader.readuntil(b"\r\n\r\n")
        await asyncio.sleep(1.5)
        async with asyncio.timeout(5):
            with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
                await reader.readexactly(44 + 100 * 44100 * 4)
        writer.close()


@pytest.mark.parametrize("chunked", [False, True])
async def test_an_upload_above_the_limit_is_413(chunked: bool) -> None:
    backend = ToneBackend()
    body = b"".join(
        [
            b'--B\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nx\r\n',
            b'--B\r\nContent-Disposition: form-data; name="audio"; filename="a.wav"\r\n\r\n',
            bytes(4_000_000),
            b"\r\n--B--\r\n",
        ]
    )

    async def stream() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 65536):
            yield body[start : start + 65536]

    async with connect(backend, max_upload_bytes=1_000_000) as client:
        headers = {"content-type": "multipart/form-data; boundary=B"}
        content = stream() if chunked else body
        reply = await client.post("/v1/audio/variations", content=content, headers=headers)
        assert reply.status_code == 413, reply.text
        assert "audio" in reply.json()["detail"]
        assert (await client.get("/health")).status_code == 200
    assert backend.requests == []


async def test_an_upload_just_above_the_limit_is_413_too() -> None:
    wav = make_audio_file(duration_s=0.5)
    for limit, status in ((len(wav), 200), (len(wav) - 1, 413)):
        async with connect(ToneBackend(), max_upload_bytes=limit) as client:
            form = {"prompt": "x", "duration": "1"}
            reply = await client.post("/v1/audio/variations", data=form, files={"audio": wav})
            assert reply.status_code == status, reply.text


async def test_a_json_body_above_the_limit_is_413() -> None:
    async with connect(ToneBackend(), max_fields_bytes=10_000) as client:
        reply = await client.post(URL, json={"prompt": "x" * 10_000})
    assert reply.status_code == 413
    assert "body" in reply.json()["detail"]


async def test_a_body_declared_too_large_is_refused_without_waiting_for_it() -> None:
    async with serve(ToneBackend()) as port:
        reader, writer = await open_connection(port, b"{", length=99_999_999_999)
        async with asyncio.timeout(5):
            reply = await reader.read()
        writer.close()
    assert reply.startswith(b"HTTP/1.1 413 ")


async def test_more_generations_than_a_process_takes_are_refused_in_json_and_health_still_answers() -> None:
    backend = ToneBackend(delay_s=2.0)
    async with connect(backend, max_generations=20) as client:
        bodies = [{"prompt": "a", "duration": 0.1, "seed": seed} for seed in range(25)]
        waiting = [asyncio.create_task(client.post(URL, json=body)) for body in bodies]
        await wait_until(lambda: backend.num_running == 20)
        assert (await client.get("/health")).status_code == 200
        answers = await asyncio.gather(*waiting)
    refused = [answer for answer in answers if answer.status_code == 503]
    assert len(refused) == 5
    assert {answer.headers["retry-after"] for answer in refused} == {"5"}
    assert "too many requests" in refused[0].json()["detail"]
    assert sum(answer.status_code == 200 for answer in answers) == 20


async def test_more_decoded_audio_than_a_process_holds_is_refused_until_some_is_done() -> None:
    backend = ToneBackend(delay_s=1.0)
    form = {"prompt": "a", "duration": "0.1"}
    files = {"audio": make_audio_file(duration_s=1.0)}  # 353 kB when decoded
    async with connect(backend, max_source_bytes=500_000) as client:
        first = asyncio.create_task(client.post("/v1/audio/variations", data=form, files=files))
        await wait_until(lambda: backend.num_running == 1)
        second = await client.post("/v1/audio/variations", data=form, files=files)
        assert (second.status_code, second.headers["retry-after"]) == (503, "5")
        assert "audio" in second.json()["detail"]
        assert (await client.post(URL, json={"prompt": "a", "duration": 0.1})).status_code == 200
        assert (await first).status_code == 200
        assert (await client.post("/v1/audio/variations", data=form, files=files)).status_code == 200
