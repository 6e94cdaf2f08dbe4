"""The load balancer configurations in `cluster/load_balancer/`, with other addresses, in front of two fake servers."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from stable_audio_serve.api.middleware.limits import MAX_FIELDS_BYTES, ClientTimes
from stable_audio_serve.core.settings import ApiSettings, ProxySettings
from tests.cluster.balancers import FILES, check, configured, start
from tests.cluster.tools import CLUSTER, run_program
from tests.serving.launched import free_port
from tests.sockets import listening

pytestmark = pytest.mark.cluster

_PATIENCE_S = 60.0
_MIB = 1024 * 1024


@dataclass
class Server:
    """A fake server that records its requests. A test can make the server unready or overloaded."""

    is_ready: bool = True
    refuses: bool = False
    requests: list[str] = field(default_factory=list)
    num_bytes: int = 0
    heard: asyncio.Event = field(default_factory=asyncio.Event)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        request = Request(scope, receive)
        if request.url.path == "/ready":
            await Response(status_code=200 if self.is_ready else 503)(scope, receive, send)
            return
        self.requests.append(f"{request.method} {request.url.path}")
        async for part in request.stream():
            self.num_bytes += len(part)
        await self._answer(request)(scope, receive, send)

    def _answer(self, request: Request) -> Response:
        if self.refuses:
            return JSONResponse({"detail": "full"}, 503, {"Retry-After": "7"})
        if request.url.path == "/events":
            return StreamingResponse(self._events(), media_type="text/event-stream")
        return JSONResponse({name: request.headers.get(name) for name in ("host", "x-forwarded-proto")})

    async def _events(self) -> AsyncIterator[bytes]:
        yield b"data: first\n\n"
        await self.heard.wait()
        yield b"data: last\n\n"


@dataclass
class BrokenServer:
    """A fake server that is ready, but closes the connection of every POST without a response."""

    requests: list[str] = field(default_factory=list)

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            method, path, *_ = (await reader.readuntil(b"\r\n\r\n")).decode().split()
            if method == "GET":
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            else:
                self.requests.append(path)
        writer.close()

    async def post_until_reached(self, client: httpx.AsyncClient, path: str) -> list[int]:
        """Send requests until one of them reaches this server. Returns the statuses of all responses."""
        statuses = []
        while path not in self.requests:
            assert len(statuses) < 50, "no request has reached the broken server"
            statuses.append((await client.post(path, json={"prompt": "rain"})).status_code)
            await asyncio.sleep(0.1)
        return statuses


@dataclass(frozen=True)
class Balanced:
    """A running load balancer, its two servers and a client."""

    client: httpx.AsyncClient
    port: int
    servers: tuple[Server, Server]

    async def post(self, path: str, num: int = 1) -> list[httpx.Response]:
        return [await self.client.post(path, json={"prompt": "rain"}) for _ in range(num)]

    async def send(self, text: str) -> bytes:
        """Send `text` on a new connection. Returns everything that is received until the connection ends."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(text.encode())
        received = b""
        with suppress(ConnectionError):  # the load balancer may reset the connection
            async with asyncio.timeout(_PATIENCE_S):
                while part := await reader.read(65_536):
                    received += part
                    if b"413" in received:
                        break  # the connection may stay open, because the body is incomplete
        writer.close()
        return received

    async def until_only(self, server: Server, *, path: str = "/who") -> None:
        """Send requests until three in a row go to `server`."""
        for _ in range(200):
            before = len(server.requests)
            for _ in range(3):
                await self.client.get(path)
            if len(server.requests) == before + 3:
                return
            await asyncio.sleep(0.1)
        raise AssertionError("requests still go elsewhere")


@asynccontextmanager
async def running(
    name: str, folder: Path, *, ports: tuple[int, int], slow_s: float | None = None
) -> AsyncIterator[int]:
    """Run a load balancer for servers on these ports. Yields its port once a server responds through it."""
    port = free_port()
    path = configured(name, folder, ports=ports, port=port, slow_s=slow_s)
    process = start(name, path)
    try:
        async with httpx.AsyncClient() as client, asyncio.timeout(_PATIENCE_S):
            while not await _answers(client, f"http://127.0.0.1:{port}/who"):
                assert process.poll() is None, (folder / "log").read_text()
                await asyncio.sleep(0.05)
        yield port
    finally:
        process.terminate()
        process.wait(_PATIENCE_S)


@asynccontextmanager
async def balancing(name: str, folder: Path, *, slow_s: float | None = None) -> AsyncIterator[Balanced]:
    servers = Server(), Server()
    async with (
        listening(servers[0]) as first,
        listening(servers[1]) as second,
        running(name, folder, ports=(first, second), slow_s=slow_s) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=_PATIENCE_S) as client,
    ):
        for server in servers:
            server.requests.clear()
        yield Balanced(client, port, servers)


async def _answers(client: httpx.AsyncClient, url: str) -> bool:
    try:
        return (await client.get(url)).status_code == 200
    except httpx.TransportError:
        return False


both = pytest.mark.parametrize("name", sorted(FILES))


@both
def test_file_is_accepted_without_a_warning(name: str, tmp_path: Path) -> None:
    checked = check(name, configured(name, tmp_path, ports=(8001, 8002), port=8080))
    assert checked.returncode == 0, checked.stderr
    assert not re.search(r"warn|alert|emerg", checked.stderr, flags=re.IGNORECASE), checked.stderr


def test_haproxy_starts_before_host_names_resolve(tmp_path: Path) -> None:
    checked = run_program("haproxy", "-c", "-f", CLUSTER / "load_balancer" / "haproxy.cfg")
    assert checked.returncode == 0, checked.stderr


def test_limits_match_the_servers() -> None:
    api, proxy = ApiSettings(), ProxySettings()
    nginx, haproxy = ((CLUSTER / "load_balancer" / file).read_text() for file in ("nginx.conf", "haproxy.cfg"))
    largest = api.max_upload_bytes + MAX_FIELDS_BYTES
    for line in (
        f"client_header_timeout {proxy.header_timeout_s:g}s;",
        f"client_max_body_size {largest // _MIB}m;",
        f"send_timeout {ClientTimes().send_idle_s:g}s;",
        f"proxy_read_timeout {api.max_deadline_s:g}s;",
        f"client_body_buffer_size {MAX_FIELDS_BYTES // _MIB}m;",
    ):
        assert f" {line}" in nginx
    for line in (
        f"timeout http-request {proxy.header_timeout_s:g}s",
        f"timeout client {proxy.idle_timeout_s:g}s",
        f"timeout server {api.max_deadline_s:g}s",
        f"gt {largest} ",
    ):
        assert line in haproxy


@both
async def test_events_are_passed_on_immediately(name: str, tmp_path: Path) -> None:
    async with balancing(name, tmp_path) as balanced, balanced.client.stream("GET", "/events") as answer:
        lines = answer.aiter_lines()
        assert await anext(lines) == "data: first"
        for server in balanced.servers:
            server.heard.set()
        assert [line async for line in lines if line] == ["data: last"]


@both
async def test_uploads_up_to_the_servers_limit_pass(name: str, tmp_path: Path) -> None:
    async with balancing(name, tmp_path) as balanced:
        largest = b"x" * (ApiSettings().max_upload_bytes + MAX_FIELDS_BYTES)
        assert (await balanced.client.post("/jobs/inpaint", content=largest)).status_code == 200
        assert sum(server.num_bytes for server in balanced.servers) == len(largest)
        head = f"POST /jobs/inpaint HTTP/1.1\r\nHost: a\r\nContent-Length: {len(largest) + 1}\r\n\r\n"
        refused = await balanced.send(head + "x" * 65_536)
        assert refused.startswith(b"HTTP/1.1 413 ")
        assert b"too large" in refused


@both
async def test_incomplete_requests_end_without_reaching_a_server(name: str, tmp_path: Path) -> None:
    async with balancing(name, tmp_path, slow_s=1) as balanced:
        for path, sent in (("/jobs", "X-Long: "), ("/generate", "Content-Length: 1000\r\n\r\n{")):
            await balanced.send(f"POST {path} HTTP/1.1\r\nHost: a\r\n{sent}")
        assert not any(server.requests for server in balanced.servers)


@both
async def test_http_2_is_not_used_in_clear_text(name: str, tmp_path: Path) -> None:
    async with balancing(name, tmp_path) as balanced:
        answer = await balanced.send("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
    assert b" 400 " in answer.split(b"\r\n")[0]


@both
async def test_links_use_the_host_of_the_request(name: str, tmp_path: Path) -> None:
    async with balancing(name, tmp_path) as balanced:
        body = (await balanced.client.get("/who", headers={"Host": "audio.example.org"})).json()
        assert body == {"host": "audio.example.org", "x-forwarded-proto": "http"}


@both
async def test_requests_go_to_the_server_with_the_fewest_requests(name: str, tmp_path: Path) -> None:
    async with balancing(name, tmp_path) as balanced, balanced.client.stream("GET", "/events") as answer:
        lines = answer.aiter_lines()
        assert await anext(lines)
        (busy,) = (server for server in balanced.servers if server.requests)
        for _ in range(12):
            await balanced.client.get("/who")
            await asyncio.sleep(0.02)  # usually long enough for the load balancer to notice that the request has ended
        # One request is the open stream. With round robin, six of the twelve others would go to the busy server, too.
        assert len(busy.requests) - 1 <= 3
        busy.heard.set()


@both
async def test_refused_generation_is_retried_on_the_other_server(name: str, tmp_path: Path) -> None:
    async with balancing(name, tmp_path) as balanced:
        balanced.servers[0].refuses = True
        answers = await balanced.post("/generate", num=12)
        assert {answer.status_code for answer in answers} == {200}


@both
async def test_refused_job_is_not_retried(name: str, tmp_path: Path) -> None:
    async with balancing(name, tmp_path) as balanced:
        balanced.servers[0].refuses = True
        answers = await balanced.post("/jobs", num=12)
        assert sum(len(server.requests) for server in balanced.servers) == 12
        assert {answer.status_code for answer in answers} <= {200, 503}


@both
async def test_clients_get_a_servers_refusal_if_all_are_full(name: str, tmp_path: Path) -> None:
    async with balancing(name, tmp_path) as balanced:
        for server in balanced.servers:
            server.refuses = True
        for path in ("/jobs", "/generate"):
            for answer in await balanced.post(path, num=8):
                assert (answer.status_code, answer.headers["retry-after"]) == (503, "7")


async def test_haproxy_skips_a_server_that_is_not_ready(tmp_path: Path) -> None:
    async with balancing("haproxy", tmp_path) as balanced:
        leaving, staying = balanced.servers
        leaving.is_ready = False
        await balanced.until_only(staying)
        leaving.requests.clear()
        assert {answer.status_code for answer in await balanced.post("/jobs", num=10)} == {200}
        assert not leaving.requests
        leaving.is_ready, staying.is_ready = True, False
        await balanced.until_only(leaving)


async def test_haproxy_sends_retry_after_if_no_server_is_ready(tmp_path: Path) -> None:
    async with balancing("haproxy", tmp_path) as balanced:
        for server in balanced.servers:
            server.is_ready = False
        for _ in range(300):
            if (answer := await balanced.client.get("/who")).status_code != 200:
                break
            await asyncio.sleep(0.1)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")
        assert "try again" in answer.json()["detail"]


async def test_nginx_pauses_a_server_that_refuses(tmp_path: Path) -> None:
    async with balancing("nginx", tmp_path) as balanced:
        leaving, staying = balanced.servers
        leaving.refuses = True
        await balanced.until_only(staying)


@both
async def test_stopped_server_fails_no_request(name: str, tmp_path: Path) -> None:
    server = Server()
    async with (
        listening(server) as alive,
        running(name, tmp_path, ports=(alive, free_port())) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=_PATIENCE_S) as client,
    ):
        answers = [await client.post("/jobs", json={}) for _ in range(12)]
        assert {answer.status_code for answer in answers} == {200}
        assert server.requests.count("POST /jobs") == 12


@both
async def test_generation_is_retried_if_its_server_is_killed(name: str, tmp_path: Path) -> None:
    """A killed server closes connections without a response. A job may have been submitted then."""
    server, broken = Server(), BrokenServer()
    async with (
        listening(server) as alive,
        await asyncio.start_server(broken.handle, "127.0.0.1", 0) as listener,
        running(name, tmp_path, ports=(alive, listener.sockets[0].getsockname()[1])) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=_PATIENCE_S) as client,
    ):
        assert set(await broken.post_until_reached(client, "/generate")) == {200}
        *others, last = await broken.post_until_reached(client, "/jobs")
        assert set(others) <= {200}
        assert last in {502, 503}
        assert server.requests.count("POST /jobs") == len(others)
