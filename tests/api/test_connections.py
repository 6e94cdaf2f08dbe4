"""Faults that only occur over sockets: disconnected clients, slow clients, endless bodies."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import httpx
import pytest
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from stable_audio_serve.api.app import create_app
from stable_audio_serve.api.middleware.limits import ClientTimes, LimitsMiddleware
from stable_audio_serve.audio import workers
from stable_audio_serve.core.keys import hash_key
from stable_audio_serve.core.settings import ApiSettings, Settings
from tests.audio_files import make_audio_file, pcm_of
from tests.backends import ToneBackend
from tests.patience import PATIENCE_S, until
from tests.sockets import listening

pytestmark = pytest.mark.server  # tests that run a server are marked, because they are slow

URL = "/v1/audio/generations"
_JSON = "Content-Type: application/json\r\n"


@asynccontextmanager
async def connect(
    backend: ToneBackend, *, times: ClientTimes | None = None, max_generations: int = 256, **api: object
) -> AsyncIterator[httpx.AsyncClient]:
    async with (
        serve(backend, times=times, max_generations=max_generations, **api) as port,
        httpx.AsyncClient(timeout=PATIENCE_S) as client,
    ):
        client.base_url = httpx.URL(f"http://127.0.0.1:{port}")
        yield client


@asynccontextmanager
async def serve(
    backend: ToneBackend, *, times: ClientTimes | None = None, max_generations: int = 256, **api: object
) -> AsyncIterator[int]:
    """Run a uvicorn server on a free port of this machine."""
    settings = Settings.model_validate({"api": api, "ingress": {"max_ongoing_requests": max_generations}})
    async with listening(create_app(backend, settings, client_times=times)) as port:
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
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\n{headers}"
    writer.write(f"{head}Content-Length: {len(body) if length is None else length}\r\n\r\n".encode() + body)
    await writer.drain()
    return reader, writer


async def test_disconnect_cancels_the_generation() -> None:
    backend = ToneBackend(delay_s=30)
    async with serve(backend) as port:
        writer = await open_request(port, b'{"prompt": "x"}', headers=_JSON + "x-request-disconnect-disabled: ?1\r\n")
        await until(lambda: backend.num_running == 1)
        writer.close()
        await until(lambda: backend.num_running == 0)
    assert backend.num_cancelled == 1


async def test_a_hundred_disconnects_leave_nothing_running() -> None:
    backend = ToneBackend(delay_s=30)
    async with serve(backend) as port:
        for index in range(100):
            writer = await open_request(port, b'{"prompt": "x"}')
            await asyncio.sleep(0.001 * (index % 4))
            writer.transport.abort()
        await until(lambda: backend.num_running == 0)
        assert backend.num_cancelled == len(backend.requests)
        backend.delay_s = 0
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_S) as client:
            assert (await client.post(URL, json={"prompt": "x", "duration": 0.1})).status_code == 200


async def test_one_connection_serves_many_requests() -> None:
    async with connect(ToneBackend()) as client:
        for duration_s in (0.1, 20.0, 0.1):
            reply = await client.post(URL, json={"prompt": "x", "duration": duration_s})
            assert len(pcm_of(reply.content)) == 4 * int(44100 * duration_s)
        assert (await client.post(URL, json={"prompt": ""})).status_code == 422
        assert (await client.get("/health")).status_code == 200


FAST = ClientTimes(window_s=0.4, rate_bytes_s=5000)  # at least 2,000 bytes per 0.4 s


@pytest.mark.parametrize(
    ("times", "reason"),
    [
        (FAST, "body: arrived more slowly than 5000 bytes per second"),
        (ClientTimes(total_s=0.2), "body: did not arrive within 0.2 s"),
    ],
)
async def test_body_that_does_not_arrive_is_408(times: ClientTimes, reason: str) -> None:
    async with serve(ToneBackend(), times=times) as port:
        reader, writer = await open_connection(port, b'{"prom', length=1000)
        async with asyncio.timeout(PATIENCE_S):
            reply = await reader.read()  # returns when the server closes the connection
        writer.close()
    assert reply.startswith(b"HTTP/1.1 408 ")
    assert json.dumps({"detail": reason}, separators=(",", ":")).encode() in reply


async def trickle(port: int, part: bytes, *, every_s: float, length: int, headers: str = _JSON) -> tuple[bytes, int]:
    """Send a body of `length` bytes in parts. Returns the response and the number of bytes sent."""
    reader, writer = await open_connection(port, b"", headers=headers, length=length)
    answer = asyncio.create_task(reader.readuntil(b"\r\n"))
    num_sent = 0
    async with asyncio.timeout(PATIENCE_S):
        while num_sent < length and not answer.done():
            writer.write(part)
            num_sent += len(part)
            await asyncio.wait({answer}, timeout=every_s)
        status = await answer
    writer.close()
    return status, num_sent


async def test_slow_body_without_pauses_is_ended() -> None:
    async with serve(ToneBackend(), times=FAST) as port:
        status, num_sent = await trickle(port, b" ", every_s=0.02, length=100_000)
    assert status.startswith(b"HTTP/1.1 408 ")
    assert num_sent < 2000


async def test_fast_start_does_not_pay_for_a_slow_rest() -> None:
    async with serve(ToneBackend(), times=FAST) as port:
        reader, writer = await open_connection(port, bytes(500_000), length=1_000_000)
        async with asyncio.timeout(60):  # the 500 kB count as 100 s at the minimum rate
            assert (await reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 408 ")
        writer.close()


async def test_slow_body_at_the_minimum_rate_is_accepted() -> None:
    backend = ToneBackend()
    body = b'{"prompt": "x", "duration": 0.1, "seed": 7}'
    async with serve(backend, times=ClientTimes(window_s=5.0, rate_bytes_s=1000, grace_s=0.01)) as port:
        reader, writer = await open_connection(port, b"", length=len(body) + 12_000)
        for part in (body, *[b" " * 3000] * 4):
            writer.write(part)
            await asyncio.sleep(0.1)
        async with asyncio.timeout(PATIENCE_S):
            assert (await reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 200 ")
        writer.close()
    assert [request.seed for _, request in backend.requests] == [7]


async def test_slow_handler_is_not_mistaken_for_a_slow_client() -> None:
    parts = asyncio.Queue[bytes]()

    async def read_slowly(scope: Scope, receive: Receive, send: Send) -> None:
        num_bytes, more = 0, True
        while more:
            message = await receive()
            num_bytes, more = num_bytes + len(message["body"]), message["more_body"]
            await asyncio.sleep(0.6)  # longer than `window_s`
        await parts.put(num_bytes)
        await Response("done")(scope, receive, send)

    async with listening(LimitsMiddleware(read_slowly, limits=ApiSettings(), times=replace(FAST, grace_s=0.1))) as port:
        reader, writer = await open_connection(port, b"1", length=3)
        for _ in range(2):
            await asyncio.sleep(0.3)
            writer.write(b"1")
        async with asyncio.timeout(PATIENCE_S):
            assert (await reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 200 ")
        writer.close()
    assert await parts.get() == 3


async def test_too_many_slow_bodies_are_refused_but_fast_ones_accepted() -> None:
    # `window_s` is so long that no connection is closed because its body is too slow.
    times = ClientTimes(grace_s=0.3, window_s=PATIENCE_S, max_slow=4)
    keys = [f"key-{number}" for number in range(12)]  # the bodies are of different clients
    hashes = [f"{key}:{hash_key(key.encode())}" for key in keys]
    async with connect(ToneBackend(), times=times, key_hashes=hashes) as client:
        port = client.base_url.port
        assert port is not None
        client.headers["authorization"] = f"Bearer {keys[0]}"
        headers = [f"{_JSON}Authorization: Bearer {key}\r\n" for key in keys]
        slow = [await open_connection(port, b"{", length=1000, headers=each) for each in headers]
        first_lines = [asyncio.create_task(reader.readuntil(b"\r\n\r\n")) for reader, _ in slow]
        async with asyncio.timeout(PATIENCE_S):
            while sum(line.done() for line in first_lines) < 8:
                assert (await client.get("/health")).status_code == 200
                assert (await client.post(URL, json={"prompt": "x", "duration": 0.1})).status_code == 200
                await asyncio.sleep(0.05)
        refused = [line.result() for line in first_lines if line.done()]
        assert all(answer.startswith(b"HTTP/1.1 503 ") and b"retry-after: 5" in answer.lower() for answer in refused)
        assert len(refused) == 8
        for line, (_, writer) in zip(first_lines, slow, strict=True):
            if not line.done():
                writer.transport.abort()
        await asyncio.gather(*first_lines, return_exceptions=True)
        status = b"503"
        async with asyncio.timeout(PATIENCE_S):
            while status == b"503":  # until the server has noticed that the slow clients are gone
                reader, writer = await open_connection(port, b'{"prompt": "x", ', length=37, headers=headers[0])
                await asyncio.sleep(0.4)  # longer than `grace_s`, so the client counts as slow
                writer.write(b'"duration": 0.1     }')
                _, status, _ = (await reader.readuntil(b"\r\n")).split(b" ", 2)
                writer.close()
        assert status == b"200"


@pytest.mark.parametrize("is_keyed", [False, True])
async def test_one_client_may_send_a_quarter_of_the_slow_bodies(is_keyed: bool) -> None:
    times = ClientTimes(grace_s=0.1, window_s=PATIENCE_S, max_slow=8)
    keys = {"key_hashes": [f"{name}:{hash_key(name.encode())}" for name in ("alice", "bob")]} if is_keyed else {}
    own, other = (f"{_JSON}Authorization: Bearer {name}\r\n" for name in ("alice", "bob"))
    async with serve(ToneBackend(), times=times, **keys) as port:
        slow = [await open_connection(port, b"{", length=1000, headers=own) for _ in range(5)]
        first_lines = [asyncio.create_task(reader.readuntil(b"\r\n")) for reader, _ in slow]
        await until(lambda: sum(line.done() for line in first_lines) >= 3)
        await asyncio.sleep(0.3)
        refused = [line.result() for line in first_lines if line.done()]
        assert [answer.split()[1] for answer in refused] == [b"503"] * 3
        reader, writer = await open_connection(port, b'{"prompt": "x", ', length=37, headers=other)
        await asyncio.sleep(0.5)  # longer than `grace_s`, so the body counts as slow
        writer.write(b'"duration": 0.1     }')
        status = (await reader.readuntil(b"\r\n")).split()[1]
        assert status == (b"200" if is_keyed else b"503")  # without keys, a client is an address
        for line, (_, each) in zip(first_lines, slow, strict=True):
            line.cancel()
            each.transport.abort()
        writer.close()


async def test_client_that_stops_reading_does_not_hold_its_response() -> None:
    backend = ToneBackend()
    async with serve(backend, times=ClientTimes(send_idle_s=0.3)) as port:
        reader, writer = await open_connection(port, b'{"prompt": "x", "duration": 100}')
        await reader.readuntil(b"\r\n\r\n")
        await asyncio.sleep(1.5)
        async with asyncio.timeout(PATIENCE_S):
            with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
                await reader.readexactly(44 + 100 * 44100 * 4)
        writer.close()


async def test_slow_client_that_keeps_reading_gets_its_whole_response() -> None:
    app = create_app(ToneBackend(), Settings(), client_times=ClientTimes(send_idle_s=2.0))
    body, num_bytes = b'{"prompt": "x", "duration": 7}', 44 + 7 * 44100 * 4
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16_384)
        async with listening(app, send_buffer_bytes=16_384) as port, asyncio.timeout(PATIENCE_S):
            connection.connect(("127.0.0.1", port))
            reader, writer = await asyncio.open_connection(sock=connection, limit=16_384)
            head = f"POST {URL} HTTP/1.1\r\nHost: localhost\r\n{_JSON}Content-Length: {len(body)}\r\n\r\n"
            writer.write(head.encode() + body)
            await reader.readuntil(b"\r\n\r\n")
            while num_bytes > 0:  # three seconds for 1 MiB, the largest part that the application sends
                num_bytes -= len(await reader.readexactly(min(32_768, num_bytes)))
                await asyncio.sleep(0.1)
            writer.close()


@pytest.mark.parametrize("length", ["Content-Length: 100000", "Transfer-Encoding: chunked"])
@pytest.mark.parametrize(("request_line", "status"), [("GET /health", b"200"), ("POST /nowhere", b"404")])
async def test_early_response_closes_the_connection(length: str, request_line: str, status: bytes) -> None:
    async with serve(ToneBackend()) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(f"{request_line} HTTP/1.1\r\nHost: localhost\r\n{length}\r\n\r\n".encode())
        async with asyncio.timeout(PATIENCE_S):
            answer = await reader.read()  # the server closes although the body is incomplete
        assert answer.startswith(b"HTTP/1.1 " + status)
        assert b"\r\nconnection: close\r\n" in answer.lower()
        writer.close()


async def test_body_sent_after_its_headers_does_not_lose_a_refusal() -> None:
    """Clients such as httpx send the headers and the body separately. If the server closed the connection after the
    headers, the client could lose the response.
    """
    async with serve(ToneBackend(), key_hashes=[hash_key("right")]) as port:
        body = json.dumps({"prompt": "x" * 100_000}).encode()
        reader, writer = await open_connection(port, b"", length=len(body))
        await asyncio.sleep(0.2)
        for _ in range(2):  # the connection stays usable
            writer.write(body)
            await writer.drain()
            await asyncio.sleep(0.1)
            async with asyncio.timeout(PATIENCE_S):
                head = await reader.readuntil(b"\r\n\r\n")
                assert head.startswith(b"HTTP/1.1 401 ")
                assert b"connection: close" not in head.lower()
                length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                assert "detail" in json.loads(await reader.readexactly(length))
            writer.write(f"POST {URL} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode())
        writer.close()


async def test_client_that_awaits_permission_is_refused_at_once() -> None:
    async with serve(ToneBackend(), key_hashes=[hash_key("right")]) as port:
        reader, writer = await open_connection(port, b"", headers="Expect: 100-continue\r\n", length=1000)
        async with asyncio.timeout(PATIENCE_S):
            assert (await reader.read()).startswith(b"HTTP/1.1 401 ")
        writer.close()


async def test_too_large_form_fields_are_413() -> None:
    async with connect(ToneBackend()) as client:
        reply = await client.post(URL, json={"prompt": "x" * 1_100_000})
        assert reply.status_code == 413
        assert "body" in reply.json()["detail"]
        multipart = {"content-type": "multipart/form-data; boundary=B"}
        for path in (URL, "/jobs", "/v1/audio/generate", "/v2/generate/audio", "/fal-ai/stable-audio", "/v1/music"):
            reply = await client.post(path, content=bytes(1_100_000), headers=multipart)
            assert reply.status_code == 413, (path, reply.text)
            assert "1048576" in reply.text, path


async def test_upload_above_the_limit_is_413() -> None:
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
        for content in (body, stream()):
            reply = await client.post("/v1/audio/variations", content=content, headers=headers)
            assert reply.status_code == 413, reply.text
            assert "audio" in reply.json()["detail"]
            assert (await client.get("/health")).status_code == 200
    assert backend.requests == []


async def test_upload_just_above_the_limit_is_413() -> None:
    wav = make_audio_file(duration_s=0.5)
    for limit, status in ((len(wav), 200), (len(wav) - 1, 413)):
        async with connect(ToneBackend(), max_upload_bytes=limit) as client:
            form = {"prompt": "x", "duration": "1"}
            reply = await client.post("/v1/audio/variations", data=form, files={"audio": wav})
            assert reply.status_code == status, reply.text


async def test_declared_too_large_body_is_refused_without_reading() -> None:
    async with serve(ToneBackend()) as port:
        reader, writer = await open_connection(port, b"{", length=99_999_999_999)
        async with asyncio.timeout(PATIENCE_S):
            reply = await reader.read()
        writer.close()
    assert reply.startswith(b"HTTP/1.1 413 ")


async def test_too_many_generations_are_refused_while_health_responds() -> None:
    backend = ToneBackend()
    backend.released.clear()
    async with connect(backend, max_generations=20) as client:
        bodies = [{"prompt": "a", "duration": 0.1, "seed": seed} for seed in range(25)]
        waiting = [asyncio.create_task(client.post(URL, json=body)) for body in bodies]
        await until(lambda: backend.num_running == 20)
        assert (await client.get("/health")).status_code == 200
        await until(lambda: sum(task.done() for task in waiting) == 5)
        backend.released.set()
        answers = await asyncio.gather(*waiting)
    refused = [answer for answer in answers if answer.status_code == 503]
    assert len(refused) == 5
    assert {answer.headers["retry-after"] for answer in refused} == {"5"}
    assert "too many requests" in refused[0].json()["detail"]
    assert sum(answer.status_code == 200 for answer in answers) == 20


async def test_too_much_decoded_audio_is_refused_until_some_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "MAX_SOURCE_BYTES", 500_000)
    backend = ToneBackend()
    backend.released.clear()
    form = {"prompt": "a", "duration": "0.1"}
    files = {"audio": make_audio_file(duration_s=1.0)}  # takes 353 kB of memory when decoded
    async with connect(backend) as client:
        first = asyncio.create_task(client.post("/v1/audio/variations", data=form, files=files))
        await until(lambda: backend.num_running == 1)
        second = await client.post("/v1/audio/variations", data=form, files=files)
        assert (second.status_code, second.headers["retry-after"]) == (503, "5")
        assert "audio" in second.json()["detail"]
        text_only = asyncio.create_task(client.post(URL, json={"prompt": "a", "duration": 0.1}))
        await until(lambda: backend.num_running == 2)
        backend.released.set()
        assert (await text_only).status_code == 200
        assert (await first).status_code == 200
        assert (await client.post("/v1/audio/variations", data=form, files=files)).status_code == 200


async def test_a_handler_is_cancelled_once_if_the_server_cancels_it_too() -> None:
    """Ray Serve cancels the task of a request when its client disconnects."""
    requests: list[Message] = [{"type": "http.request"}]
    is_waiting, is_ending, has_ended = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def receive() -> Message:
        if requests:
            return requests.pop()
        await is_waiting.wait()
        return {"type": "http.disconnect"}

    async def handle(_: Scope, receive: Receive, __: Send) -> None:
        await receive()
        is_waiting.set()
        try:
            await asyncio.Event().wait()
        finally:
            is_ending.set()
            await asyncio.sleep(0.01)  # for example, the handler cancels its job
            has_ended.set()

    async def drop(message: Message) -> None:
        pass

    scope: Scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
    handling = asyncio.create_task(LimitsMiddleware(handle, limits=ApiSettings())(scope, receive, drop))
    await is_ending.wait()
    handling.cancel()
    await asyncio.wait({handling}, timeout=PATIENCE_S)
    assert handling.cancelled()
    assert has_ended.is_set()


@pytest.mark.parametrize("is_read", [False, True])
async def test_only_a_part_of_an_unread_body_is_dropped(is_read: bool) -> None:
    """A proxy that is still sending the body answers 502 in place of the refusal when the connection closes."""
    num_received, headers = 0, {}

    async def handle(scope: Scope, receive: Receive, send: Send) -> None:
        if is_read:
            with pytest.raises(HTTPException, match="larger than"):
                await receive()
        await Response("no")(scope, receive, send)

    async def receive() -> Message:
        nonlocal num_received
        num_received += 1
        return {"type": "http.request", "body": bytes(2**20), "more_body": num_received < 64}

    async def send(message: Message) -> None:
        headers.update(message.get("headers", ()))

    scope = {"type": "http", "method": "POST", "headers": [(b"content-length", b"67108864")]}
    await LimitsMiddleware(handle, limits=ApiSettings())(scope, receive, send)
    assert (num_received - is_read, headers[b"connection"]) == (16, b"close")
