"""HAProxy as Ray's code starts it through our wrapper program: time limits, addresses, file modes and reloads."""

from __future__ import annotations

import asyncio
import json
import os
import re
import resource
import socket
import stat
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from stable_audio_serve.core.settings import MetricsSettings, ProxySettings, Settings
from stable_audio_serve.launcher.environment import claim_ports, haproxy_environment
from stable_audio_serve.serving.haproxy import (
    ADDRESS_HEADER,
    ConfigurationChangedError,
    ProxyOptions,
    address_header,
    find_binary,
    finish,
)
from tests.patience import PATIENCE_S, until
from tests.serving.launched import free_port
from tests.sockets import listening

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="HAProxy mode is for Linux"),
]

_PUBLIC = "127.0.0.2"  # the address that our wrapper makes HAProxy listen on, in place of Ray's
_HEADER_TIMEOUT_S = 1.0
_IDLE_TIMEOUT_S = 1.5
_LONG_S = 2.5 * _IDLE_TIMEOUT_S
_ONE_KEPT_CONNECTION = httpx.Limits(max_connections=1, keepalive_expiry=None)
_END_S = 30.0  # HAProxy must close a connection within this time, even on a slow machine
_EDITED = (
    "stats socket",
    "local0 info",
    "global",
    "maxconn",
    "defaults",
    "retry-on",
    "timeout client",
    "http-reuse always",
    "errorfile 502",
    "errorfile 503",
    "errorfile 504",
    "frontend prometheus",
    "frontend http_frontend",
    "listen stats",
)

app = FastAPI()
reached: list[str] = []
released = asyncio.Event()


@app.post("/upload")
async def upload(request: Request) -> int:
    return len(await request.body())


@app.post("/never")
async def never() -> None:
    """A route that must not be reached: records the call."""
    reached.append("/never")


@app.get("/wait")
async def wait() -> str:
    reached.append("/wait")
    await released.wait()
    return "waited"


@app.get("/address")
async def address(request: Request) -> list[str]:
    return request.headers.getlist(ADDRESS_HEADER)


@app.get("/names")
async def names(request: Request) -> list[str]:
    return [name for name in request.headers if name not in {"accept", "accept-encoding", "connection", "user-agent"}]


@app.get("/slow")
async def slow() -> str:
    await asyncio.sleep(_LONG_S)
    return "made"


@app.get("/events")
async def events() -> StreamingResponse:
    async def stream() -> AsyncIterator[str]:
        yield "first\n"
        await asyncio.sleep(_LONG_S)
        yield "last\n"

    return StreamingResponse(stream())


@dataclass(frozen=True, slots=True)
class Proxy:
    """A running HAProxy, and `api`, Ray's object that controls it."""

    api: Any
    port: int
    ports: range  # the statistics page is on the second port, the metrics are on the third
    config: Path
    socket: Path

    @property
    def url(self) -> str:
        return f"http://{_PUBLIC}:{self.port}"


@asynccontextmanager
async def proxying(
    backend_port: int, folder: Path, monkeypatch: pytest.MonkeyPatch, *, public: str = _PUBLIC
) -> AsyncIterator[Proxy]:
    from ray.serve._private import haproxy as ray_haproxy
    from ray.serve.config import HTTPOptions

    settings = Settings(proxy=ProxySettings(header_timeout_s=_HEADER_TIMEOUT_S, idle_timeout_s=_IDLE_TIMEOUT_S))
    port = free_port()
    with claim_ports("127.0.0.1") as ports:
        for name, value in haproxy_environment(ports, folder, host=public, settings=settings).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(ray_haproxy, "RAY_SERVE_HAPROXY_BINARY_PATH", os.environ["RAY_SERVE_HAPROXY_BINARY_PATH"])
        config = ray_haproxy.HAProxyConfig(
            http_options=HTTPOptions(host="127.0.0.1", port=port),
            socket_path=str(folder / "admin.sock"),
            server_state_base=str(folder),
            server_state_file=str(folder / "server-state"),
            stats_port=ports[1],
            metrics_port=ports[2],
            metrics_enabled=False,
            has_received_routes=True,
        )
        server = ray_haproxy.ServerConfig(name="replica", host="127.0.0.1", port=backend_port)
        backend = ray_haproxy.BackendConfig(
            name="http-app", path_prefix="/", app_name="app", servers=[server], http_health_check_path="/docs"
        )
        api = ray_haproxy.HAProxyApi(config, {"app": backend}, config_file_path=str(folder / "haproxy.cfg"))
        await api.start()
        try:
            yield Proxy(api, port, ports, folder / "haproxy.cfg", folder / "admin.sock")
        finally:
            await api.stop()


async def until_closed(host: str, port: int, *, first: bytes, drip: bytes = b"") -> float:
    """Open a connection, send `first`, then `drip` repeatedly.

    Return the seconds until HAProxy closes the connection.
    """
    reader, writer = await asyncio.open_connection(host, port)
    began_at = time.monotonic()
    writer.write(first)

    async def keep_dripping() -> None:
        while drip:
            await asyncio.sleep(0.1)
            writer.write(drip)

    dripping = asyncio.create_task(keep_dripping())
    try:
        async with asyncio.timeout(_END_S):
            await reader.read()
    except ConnectionError:
        pass  # HAProxy has closed the connection
    finally:
        dripping.cancel()
        writer.close()
    return time.monotonic() - began_at


async def test_half_open_connections_end_but_long_answers_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half_open = [
        (b"POST /upload HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\na", b""),
        (b"", b""),
        (b"G", b""),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX-Long: ", b"a"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b""),
    ]
    async with (
        listening(app) as backend_port,
        proxying(backend_port, tmp_path, monkeypatch) as proxy,
        httpx.AsyncClient(base_url=proxy.url, timeout=PATIENCE_S) as client,
    ):
        slow, events, *_ = await asyncio.gather(
            client.get("/slow"),
            client.get("/events"),
            *(until_closed(_PUBLIC, proxy.port, first=first, drip=drip) for first, drip in half_open),
        )
    assert slow.json() == "made"
    assert events.text == "first\nlast\n"


async def test_client_address_header_cannot_be_forged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forged = [(ADDRESS_HEADER, "192.0.2.1"), (ADDRESS_HEADER.lower(), "192.0.2.2"), ("X-Forwarded-For", "192.0.2.3")]
    transport = httpx.AsyncHTTPTransport(local_address="127.0.0.3")
    async with (
        listening(app) as backend_port,
        proxying(backend_port, tmp_path, monkeypatch) as proxy,
        httpx.AsyncClient(base_url=proxy.url, timeout=PATIENCE_S, transport=transport) as client,
    ):
        assert (await client.get("/address", headers=forged)).json() == ["127.0.0.3"]
    assert address_header(os.environ) == ADDRESS_HEADER
    # Only our wrapper makes HAProxy add a header with the client's address.
    assert address_header({"RAY_SERVE_ENABLE_HA_PROXY": "1"}) is None


async def test_clients_cannot_send_headers_that_ray_obeys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.serve._private import constants, http_util

    obeyed = [
        constants.SERVE_HTTP_REQUEST_TIMEOUT_S_HEADER,
        constants.SERVE_HTTP_REQUEST_DISCONNECT_DISABLED_HEADER,
        constants.SERVE_MULTIPLEXED_MODEL_ID,
        constants.SERVE_MULTIPLEXED_MODEL_ID.replace("_", "-"),
        constants.SERVE_SESSION_ID,
        constants.SERVE_SESSION_ID.replace("-", "_"),
    ]
    assert all(map(http_util._matches_session_id_header, obeyed[-2:]))
    async with (
        listening(app) as backend_port,
        proxying(backend_port, tmp_path, monkeypatch) as proxy,
        httpx.AsyncClient(base_url=proxy.url, timeout=PATIENCE_S) as client,
    ):
        kept = {"X-Request-Id": "mine-1", "X-Session-Identity": "a"}
        answer = await client.get("/names", headers=dict.fromkeys(obeyed, "1") | kept)
        assert {*answer.json()} == {"host", ADDRESS_HEADER.lower(), *map(str.lower, kept)}
        # Ray would decode the request id as UTF-8 before the application sees the request.
        answer = await client.get("/names", headers={"X-Request-Id": b"\xff\xfe"})
        assert {*answer.json()} == {"host", ADDRESS_HEADER.lower()}


async def test_http_2_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With HTTP/2, a single connection could hold a hundred unfinished requests in HAProxy's memory."""
    async with listening(app) as backend_port, proxying(backend_port, tmp_path, monkeypatch) as proxy:
        answers = [
            await exchange(port, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", host=host)
            for host, port in ((_PUBLIC, proxy.port), *(("127.0.0.1", port) for port in proxy.ports[1:3]))
        ]
    assert [answer.split(b"\r\n")[0] for answer in answers] == [b"HTTP/1.1 400 Bad request"] * 3


@pytest.mark.slow
async def test_long_request_survives_twenty_reloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a reload, the replaced HAProxy process serves its running requests before it ends."""
    async with (
        listening(app) as backend_port,
        proxying(backend_port, tmp_path, monkeypatch) as proxy,
        httpx.AsyncClient(base_url=proxy.url, timeout=PATIENCE_S) as client,
    ):
        waiting = asyncio.create_task(client.get("/wait"))
        await until(lambda: "/wait" in reached)
        for _ in range(20):
            assert (await client.get("/docs")).status_code == 200  # the client keeps this connection open
            await proxy.api.reload()
        await until(lambda: num_old_processes(proxy) == 1)
        (old,) = proxy.api._old_procs
        memory = sum(psutil.Process(pid).memory_info().rss for pid in (old.pid, proxy.api._proc.pid))
        released.set()
        assert (await waiting).json() == "waited"
        await until(lambda: num_old_processes(proxy) == 0)
    assert memory < 128 * 2**20


def num_old_processes(proxy: Proxy) -> int:
    """Return the number of HAProxy processes that were replaced by a reload and still serve requests."""
    proxy.api._prune_old_procs()
    return len(proxy.api._old_procs)


async def exchange(port: int, *parts: bytes, wait_for: bytes = b"", host: str = _PUBLIC) -> bytes:
    """Send the first part, wait until HAProxy has sent `wait_for`, and send the other parts.

    Returns the whole answer.
    """
    async with asyncio.timeout(PATIENCE_S):
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(parts[0])
        received = await reader.readuntil(wait_for) if wait_for else b""
        for part in parts[1:]:
            writer.write(part)
        received += await reader.read()
        writer.close()
    return received


async def test_request_reaches_a_replica_after_its_first_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reached.clear()
    head = "POST {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: {size}\r\n{more}\r\n"
    dripping = head.format(path="/never", size=1_000_000, more="").encode()
    asking = head.format(path="/upload", size=70_000, more="Expect: 100-continue\r\n").encode()
    async with listening(app) as backend_port, proxying(backend_port, tmp_path, monkeypatch) as proxy:
        late = await exchange(proxy.port, dripping, b"--")
        sent = await exchange(proxy.port, asking, b"x" * 70_000, wait_for=b"100 Continue\r\n\r\n")
    status, _, body = late.partition(b"\r\n\r\n")
    assert status.startswith(b"HTTP/1.1 408 ")
    assert b"content-type: application/json" in status.lower()
    assert "in time" in json.loads(body)["detail"]
    assert not reached
    assert sent.endswith(b"\r\n\r\n70000")


# Path -> status and content type of the fake server's answer. A replica answers with JSON or HTML. Ray Serve answers
# with plain text if there is no replica. "/cut" gets no answer: the connection is closed.
_ANSWERS = {
    "/docs": (200, "text/html"),  # HAProxy's health check uses this path, too
    "/text-404": (404, "text/plain; charset=utf-8"),
    "/text-500": (500, "text/plain"),
    "/text-503": (503, "text/plain"),
    "/json-404": (404, "application/json"),
    "/json-500": (500, "application/json"),
    "/json-504": (504, "application/json"),
}


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer the requests of one connection with the answers in `_ANSWERS`, until the client closes the connection."""
    with suppress(asyncio.IncompleteReadError):
        while path := (await reader.readuntil(b"\r\n\r\n")).split()[1].decode():
            if path not in _ANSWERS:
                break
            status, media_type = _ANSWERS[path]
            head = f"HTTP/1.1 {status} Said\r\nContent-Type: {media_type}\r\nContent-Length: 2\r\n\r\n"
            writer.write(head.encode() + b"{}")
    writer.close()


async def test_only_unanswered_requests_get_a_retry_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def has_retry_time(reply: httpx.Response) -> bool:
        return (
            reply.status_code == 503
            and int(reply.headers["retry-after"]) >= 1
            and reply.headers["content-type"] == "application/json"
            and "try again" in reply.json()["detail"]
        )

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as backend:
        backend_port = backend.sockets[0].getsockname()[1]
        async with (
            proxying(backend_port, tmp_path, monkeypatch) as proxy,
            httpx.AsyncClient(base_url=proxy.url, timeout=PATIENCE_S) as client,
        ):
            for path in ("/cut", "/text-404", "/text-500", "/text-503", "/cut"):
                assert has_retry_time(await client.get(path)), path
                assert (await client.get("/docs")).status_code == 200
            for path in ("/json-404", "/json-500", "/json-504", "/docs"):
                reply = await client.get(path)
                assert (reply.status_code, reply.headers["content-type"], reply.text) == (*_ANSWERS[path], "{}")
            backend.close()
            assert has_retry_time(await client.get("/json-404"))  # nothing listens, as after a replica was killed
            proxy.api.set_backend_configs({})
            await proxy.api.reload()
            assert has_retry_time(await client.get("/docs"))  # HAProxy knows no route, as after a restart


async def test_little_of_a_response_waits_for_a_slow_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's memory for TCP is limited. When it is used up, the kernel resets connections of other clients."""
    num_bytes = 0

    async def answer_without_end(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal num_bytes
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65_536)
        is_check = b"/file" not in await reader.readuntil(b"\r\n\r\n")  # HAProxy checks whether the server runs
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (0 if is_check else 10**9))
        with suppress(ConnectionError):
            while not is_check:
                writer.write(bytes(65_536))
                await writer.drain()
                num_bytes += 65_536
        writer.close()

    async with (
        await asyncio.start_server(answer_without_end, "127.0.0.1", 0) as backend,
        proxying(backend.sockets[0].getsockname()[1], tmp_path, monkeypatch) as proxy,
    ):
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect((_PUBLIC, proxy.port))
            client.sendall(b"GET /file HTTP/1.1\r\nHost: a\r\n\r\n")
            await until(lambda: num_bytes > 0)
            before = 0
            while num_bytes > before:
                before = num_bytes
                await asyncio.sleep(0.5)
    assert num_bytes < 2_000_000


@asynccontextmanager
async def running(config: str, folder: Path, *, port: int) -> AsyncIterator[None]:
    """Run HAProxy with this configuration, without our wrapper program, until the context ends."""
    (folder / "own.cfg").write_text(config)
    process = await asyncio.create_subprocess_exec(find_binary(), "-db", "-f", str(folder / "own.cfg"))
    try:
        await until(lambda: is_open(_PUBLIC, port))
        yield
    finally:
        process.kill()
        await process.wait()


async def test_request_without_replicas_does_not_wait_forever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Serve's own proxy keeps requests until a replica starts. Here the app stands in for it."""
    from ray.serve._private import haproxy as ray_haproxy

    reached.clear()
    released.clear()
    async with listening(app) as backend_port:
        async with proxying(backend_port, tmp_path, monkeypatch) as proxy:
            backend = proxy.api.backend_configs["app"]
            backend.fallback_server = ray_haproxy.ServerConfig(name="proxy", host="127.0.0.1", port=backend_port)
            proxy.api._generate_config_file_internal()
            assert "timeout server" not in finish(proxy.config.read_text(), ProxyOptions())
            backend.servers = []
            proxy.api._generate_config_file_internal()
            rendered = proxy.config.read_text()
        options = ProxyOptions(public_host=_PUBLIC, replica_wait_s=_LONG_S / 2)
        async with (
            running(finish(rendered, options), tmp_path, port=proxy.port),
            httpx.AsyncClient(base_url=proxy.url, timeout=PATIENCE_S) as client,
        ):
            assert (await client.get("/docs")).status_code == 200
            reply = await client.get("/wait")
    assert reached == ["/wait"]
    assert (reply.status_code, reply.headers["retry-after"]) == (503, "2")
    assert "try again" in reply.json()["detail"]


@pytest.mark.parametrize("num_replicas", [2, pytest.param(5, marks=pytest.mark.slow)])
async def test_request_after_all_replicas_stopped_is_answered(
    num_replicas: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An update stops all replicas that a replaced HAProxy knows, but the client's connection is still open.

    The app stands in for Ray Serve's own proxy, which answers then.
    """
    from ray.serve._private import haproxy as ray_haproxy

    async with listening(app) as live_port, proxying(live_port, tmp_path, monkeypatch) as proxy:
        backend = proxy.api.backend_configs["app"]
        backend.fallback_server = ray_haproxy.ServerConfig(name="proxy", host="127.0.0.1", port=live_port)
        (updated,) = backend.servers
        async with (
            AsyncExitStack() as replicas,
            httpx.AsyncClient(base_url=proxy.url, timeout=PATIENCE_S, limits=_ONE_KEPT_CONNECTION) as client,
        ):
            ports = [await replicas.enter_async_context(listening(app)) for _ in range(num_replicas)]
            backend.servers = [
                ray_haproxy.ServerConfig(name=f"old-{port}", host="127.0.0.1", port=port) for port in ports
            ]
            await proxy.api.reload()
            assert (await client.get("/docs")).status_code == 200
            backend.servers = [updated]
            await proxy.api.reload()
            await replicas.aclose()
            reply = await client.get("/docs")
    assert (reply.status_code, reply.headers["connection"]) == (200, "close")  # the replaced HAProxy's last answer


async def test_public_address_and_admin_socket_are_restricted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with listening(app) as backend_port, proxying(backend_port, tmp_path, monkeypatch) as proxy:
        await proxy.api.reload()
        async with httpx.AsyncClient(timeout=PATIENCE_S) as client:
            assert (await client.get(f"{proxy.url}/docs")).status_code == 200
            for port, path in ((proxy.ports[1], "/stats"), (proxy.ports[2], "/metrics")):
                assert (await client.get(f"http://127.0.0.1:{port}{path}")).status_code == 200
                assert not is_open(_PUBLIC, port)
        assert not is_open("127.0.0.1", proxy.port)
        assert stat.S_IMODE(proxy.socket.stat().st_mode) == 0o600


async def test_reload_keeps_every_listener_beside_an_ipv6_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 here")
    async with listening(app) as backend_port, proxying(backend_port, tmp_path, monkeypatch, public="::1") as proxy:
        await proxy.api.reload()
        for address in (("::1", proxy.port), *(("127.0.0.1", port) for port in proxy.ports[1:3])):
            socket.create_connection(address, timeout=PATIENCE_S).close()


async def test_connection_limit_follows_the_file_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with listening(app) as backend_port, proxying(backend_port, tmp_path, monkeypatch) as proxy:
        info = await proxy.api._send_socket_command("show info")
    (most,) = re.findall(r"^Maxconn: (\d+)$", info, flags=re.MULTILINE)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    num_files = 65_536 if hard == resource.RLIM_INFINITY else min(hard, 65_536)
    # The limit of connections: each takes two open files, and HAProxy needs some files for other purposes.
    assert 0.35 * num_files < int(most) <= 0.5 * num_files


def is_open(host: str, port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex((host, port)) == 0


async def test_every_edit_applies_once_or_stops_startup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with listening(app) as backend_port, proxying(backend_port, tmp_path, monkeypatch) as proxy:
        finished = proxy.config.read_text()
        proxy.api._generate_config_file_internal()
        rendered = proxy.config.read_text()
    options = ProxyOptions(public_host=_PUBLIC)
    assert finish(finished, options) == finished
    backend = rendered[rendered.index("\nbackend http-") : rendered.index("\nlisten stats")]
    another = finish(rendered + backend.replace("backend http-", "backend another-", 1), options)
    assert another.count("http-reuse never") == 2  # a cluster may have more applications than this one
    lines = rendered.splitlines(keepends=True)
    for gone in _EDITED:
        changed = "".join(line for line in lines if gone not in line)
        with pytest.raises(ConfigurationChangedError, match=gone):
            finish(changed, options)
    with pytest.raises(ConfigurationChangedError, match="error-limit"):
        finish(rendered.replace("error-limit", "limit"), options)
    proxy.config.write_text(changed)
    with pytest.raises(RuntimeError, match="crashed during startup: error: this version of Ray writes") as caught:
        await proxy.api._start_and_wait_for_haproxy()
    assert len(str(caught.value).splitlines()) == 1


def test_operators_choose_the_address_of_metrics(tmp_path: Path) -> None:
    settings = Settings(metrics=MetricsSettings(host="0.0.0.0"))
    with claim_ports("0.0.0.0") as ports:
        environ = haproxy_environment(ports, tmp_path, host=_PUBLIC, settings=settings)
    assert ProxyOptions.read(environ) == ProxyOptions(metrics_host="0.0.0.0", public_host=_PUBLIC)


def test_defaults_equal_those_of_the_settings() -> None:
    proxy, metrics = Settings().proxy, Settings().metrics
    assert ProxyOptions.read({}) == ProxyOptions(proxy.header_timeout_s, proxy.idle_timeout_s, metrics.host)


def test_program_runs_haproxy_as_a_module() -> None:
    command = [sys.executable, "-m", "stable_audio_serve.serving.haproxy", "-v"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=PATIENCE_S)
    assert shown.stdout.startswith("HAProxy version")


def test_invalid_variable_is_named() -> None:
    with pytest.raises(ValueError, match="STABLE_AUDIO_PROXY_IDLE_TIMEOUT_S"):
        ProxyOptions.read({"STABLE_AUDIO_PROXY_IDLE_TIMEOUT_S": "soon"})
