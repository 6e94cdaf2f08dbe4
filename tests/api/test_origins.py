"""Which web pages may call a server on the user's machine, by the headers Origin and Host."""

from __future__ import annotations

import re
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st

from stable_audio_serve.api.app import create_app
from stable_audio_serve.api.middleware.origins import Origins
from stable_audio_serve.core.keys import hash_key
from stable_audio_serve.core.settings import ApiSettings, Settings
from tests.api.compat.serving import make_app
from tests.api.prefixes import PATTERN
from tests.api.test_owners import ROUTES
from tests.backends import ToneBackend

pytestmark = pytest.mark.usefixtures("low_rate")

URL = "/v1/audio/generations"
BODY = {"prompt": "x", "duration": 1}
EVIL = "https://evil.example"
PROBES = re.compile(rf"{PATTERN}?/(health|ready)")

LOOPBACK = [
    "http://localhost",
    "http://localhost:3000",
    "https://localhost:8443",
    "HTTP://LOCALHOST:1",
    "http://localhost.",
    "http://app.localhost",
    "http://a.b.localhost:5173",
    "http://127.0.0.1",
    "http://127.0.0.1:8000",
    "https://127.9.9.9:1",
    "http://[::1]",
    "http://[::1]:3000",
    "http://[::ffff:127.0.0.1]",
    "http://[::ffff:7f00:1]:3000",
    "https://[::FFFF:127.9.9.9]",
]
FOREIGN = [
    EVIL,
    "http://evil.example:8000",
    "null",
    "",
    "x",
    "http://",
    "http://localhost.evil.example",
    "http://notlocalhost",
    "http://127.0.0.1.evil.example",
    "http://10.0.0.1",
    "http://[fe80::1]",
    "http://0.0.0.0",
    "file://localhost",
    "http://[::ffff:10.0.0.1]",
    "http://[::127.0.0.1]",
    "http://[::fffe:127.0.0.1]",
    "http://::ffff:127.0.0.1",
    "chrome-extension://localhost",
    "http://localhost@evil.example",
    "http://evil.example/localhost",
    "http://localhost:x",
    "http://localhost http://evil.example",
    "http://evil.example#.localhost",
    "http://1.2.3.4",
    "http://ⓛocalhost",
]
OWN_NAMES = [
    "localhost",
    "localhost:8000",
    "LOCALHOST",
    "localhost.",
    "localhost:",
    "queue.localhost:8000",
    "a.localhost",
    "a.localhost.:1",
    "queue.127.0.0.1:8000",
    "queue.10.0.0.1",
    "[::1]",
    "[::1]:8000",
    "[fe80::1]:1",
    "127.0.0.1",
    "127.0.0.1:8000",
    "10.1.2.3:80",
    "0.0.0.0:8000",
    "8.8.8.8",
    socket.gethostname(),
    f"queue.{socket.gethostname().upper()}:8000",
    f"{socket.gethostname().partition('.')[0]}.local:8000",
]
OTHER_NAMES = [
    "evil.example",
    "evil.example:8000",
    "localhost.evil.example",
    "evillocalhost",
    "127.0.0.1.evil.example",
    "queue.evil.example",
    "queue.queue.evil.example",
    "evil.local",
    ".local",
    "queue.",
    ".",
    ":",
    ":8000",
    "localhost:8000:1",
    "localhost/",
    "localhost@evil.example",
    "evil.example@localhost",
    "a b",
    "[::1",
    "::1",
    "127.0.0.1:x",
    "\xff",
    # Other spellings of IP addresses. Browsers never send them, because they normalize addresses.
    "2130706433",
    "0x7f.0.0.1",
    "127.1",
]


@asynccontextmanager
async def visit(**api: Any) -> AsyncIterator[tuple[httpx.AsyncClient, ToneBackend]]:
    """Yield a client of a server with these API settings. The client connects from the machine of the server."""
    async with make_app(run_jobs=False, api=api) as (app, backend), connect(app) as client:
        yield client, backend


def connect(app: FastAPI) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost:8000")


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> FastAPI:
    return create_app(ToneBackend(), Settings(output_dir=str(tmp_path_factory.mktemp("origins"))))


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    async with connect(app) as client:
        yield client


async def is_allowed(client: httpx.AsyncClient, **headers: str) -> bool:
    """Returns whether a POST request with these headers passes the check of Origin and Host; asserts a 403 if not."""
    reply = await client.post("/v2/generate/audio", headers={k: v.encode("latin-1") for k, v in headers.items()})
    if reply.status_code == 400:  # the request passed the check of its headers, and failed because it has no body
        return True
    assert reply.status_code == 403, reply.text
    return False


@pytest.mark.server
async def test_every_route_except_probes_checks_host_and_origin(client: httpx.AsyncClient) -> None:
    failures = []
    for route in ROUTES:
        request = route.request("0" * 32)
        for headers, is_foreign in (
            ({"Host": "evil.example:8000"}, PROBES.fullmatch(route.path) is None),
            ({"Origin": EVIL}, route.method not in ("GET", "HEAD", "OPTIONS")),
            ({"Origin": "http://localhost:3000"}, False),
        ):
            reply = await client.request(**request, headers=headers)
            is_closed = "no keys are configured" in reply.text  # admin routes without keys refuse all requests
            is_refused = reply.status_code == 403 and "upload" not in reply.text and not is_closed
            is_named = route.method == "HEAD" or (
                next(iter(headers)) in reply.text
                and reply.headers.get("content-type", "").startswith("application/json")
            )
            if is_refused != is_foreign or (is_foreign and not is_named):
                failures.append(f"{route}, {headers}: {reply.status_code} {reply.text[:200]}")
    assert not failures


async def test_trailing_slash_does_not_redirect(client: httpx.AsyncClient) -> None:
    failures = []
    for route in ROUTES:
        request = route.request("0" * 32)
        if request["url"] == "/":
            continue
        reply = await client.request(**request | {"url": f"{request['url']}/"}, headers={"Host": "evil.example"})
        is_fal_run = route.method == "POST" and route.path.endswith("/stable-audio")
        takes_the_rest = is_fal_run or route.path.endswith(("/{endpoint}", "/playground/{path}"))
        is_right = reply.status_code == (403 if takes_the_rest else 404) and "location" not in reply.headers
        if not is_right or (not takes_the_rest and "evil.example" in reply.text):
            failures.append(f"{route}: {reply.status_code} {reply.text[:200]}")
    assert not failures


async def test_refusal_has_the_form_of_the_routes_dialect(client: httpx.AsyncClient) -> None:
    async def refuse(path: str) -> Any:
        reply = await client.post(path, json={"prompt": "x"}, headers={"Origin": EVIL})
        assert reply.status_code == 403
        return reply.json()

    assert EVIL in (await refuse(URL))["detail"]
    assert EVIL in (await refuse("/generate/loop"))["error"]
    assert (await refuse("/generate")).keys() >= {"detail", "error"}
    vllm = (await refuse("/v1/audio/generate"))["error"]
    assert (vllm["code"], vllm["type"]) == (403, "PermissionDeniedError")
    aiml = await refuse("/v2/generate/audio")
    assert (aiml["statusCode"], aiml["error"], aiml["path"]) == (403, "Forbidden", "/v2/generate/audio")
    assert (await refuse("/fal-ai/stable-audio"))["error_type"] == "forbidden"
    assert (await refuse("/v1/music"))["detail"]["status"] == "missing_permissions"
    assert (await refuse("/v2beta/audio/stable-audio-2/inpaint"))["name"] == "forbidden"


async def test_refused_request_has_no_effect() -> None:
    async with visit() as (client, backend):
        for headers in ({"Origin": EVIL}, {"Origin": "null"}, {"Host": "evil.example"}):
            for path in (URL, "/jobs"):
                assert (await client.post(path, json=BODY, headers=headers)).status_code == 403
        # Browsers send such a request without a preflight request.
        form = {"Origin": EVIL, "Content-Type": "text/plain"}
        assert (await client.post("/jobs", content=b'{"prompt": "x", "duration": 1}', headers=form)).status_code == 403
        assert backend.requests == []
        assert (await client.get("/jobs")).json()["jobs"] == []


@pytest.mark.parametrize("origin", LOOPBACK)
async def test_pages_of_this_machine_are_allowed(client: httpx.AsyncClient, origin: str) -> None:
    assert await is_allowed(client, Origin=origin)
    reply = await client.get("/loras", headers={"Origin": origin})
    assert (reply.headers["access-control-allow-origin"], reply.headers["vary"]) == (origin, "Origin")


@pytest.mark.parametrize("origin", FOREIGN)
async def test_foreign_pages_can_neither_change_nor_read(client: httpx.AsyncClient, origin: str) -> None:
    raw = origin.encode("utf-8").decode("latin-1")
    assert not await is_allowed(client, Origin=raw)
    reply = await client.get("/loras", headers={"Origin": raw.encode("latin-1")})
    assert (reply.status_code, reply.headers["vary"]) == (200, "Origin")
    assert "access-control-allow-origin" not in reply.headers


@pytest.mark.parametrize(
    ("host", "origin", "is_own"),
    [
        *(("10.0.0.5:8000", f"{scheme}://10.0.0.5:8000", True) for scheme in ("http", "https")),
        *(("10.0.0.5", origin, True) for origin in ("http://10.0.0.5", "https://10.0.0.5", "http://10.0.0.5:80")),
        *(("10.0.0.5:443", origin, True) for origin in ("https://10.0.0.5", "https://10.0.0.5:443")),
        *(("10.0.0.5", origin, False) for origin in ("http://10.0.0.5:8000", "ftp://10.0.0.5", "http://10.0.0.6")),
        *(("10.0.0.5:8000", origin, False) for origin in ("http://10.0.0.5", "http://10.0.0.5:3000")),
        ("[fe80::1]:8000", "http://[fe80::1]:8000", True),
        (f"{socket.gethostname()}:8000", f"http://{socket.gethostname()}:8000", True),
        ("", "http://10.0.0.5", False),
    ],
)
async def test_pages_of_the_server_are_allowed(client: httpx.AsyncClient, host: str, origin: str, is_own: bool) -> None:
    assert await is_allowed(client, Host=host, Origin=origin) == is_own


@pytest.mark.parametrize("host", OWN_NAMES)
async def test_own_host_names_are_allowed(client: httpx.AsyncClient, host: str) -> None:
    assert await is_allowed(client, Host=host)
    assert (await client.get("/docs", headers={"Host": host})).status_code == 200


@pytest.mark.parametrize("host", OTHER_NAMES)
async def test_foreign_host_names_are_refused(client: httpx.AsyncClient, host: str) -> None:
    assert not await is_allowed(client, Host=host)
    assert not await is_allowed(client, Host=host, Origin=f"http://{host}", **{"X-Forwarded-Host": "localhost"})
    for path in ("/", "/docs", "/v1/models", "/jobs"):
        assert (await client.get(path, headers={"Host": host.encode("latin-1")})).status_code == 403


async def test_every_host_header_is_checked_and_none_is_allowed(client: httpx.AsyncClient) -> None:
    hosts = [("Host", "localhost"), ("Host", "evil.example")]
    assert (await client.get("/v1/models", headers=hosts)).status_code == 403
    assert (await client.get("/v1/models", headers=hosts[::-1])).status_code == 403
    request = client.build_request("GET", "/v1/models")
    del request.headers["Host"]
    assert (await client.send(request)).status_code == 200


async def test_forwarded_host_is_not_checked(client: httpx.AsyncClient) -> None:
    assert await is_allowed(client, **{"X-Forwarded-Host": "evil.example"})
    assert not await is_allowed(client, Origin=EVIL, **{"X-Forwarded-Host": "evil.example"})


async def preflight(client: httpx.AsyncClient, origin: str, **more: str) -> httpx.Response:
    method = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type,authorization"}
    return await client.options(URL, headers={"Origin": origin, **method, **more})


async def test_preflights_follow_the_same_rules(client: httpx.AsyncClient) -> None:
    private = {"Access-Control-Request-Private-Network": "true"}
    reply = await preflight(client, "http://localhost:3000", **private)
    assert reply.status_code == 200
    assert reply.headers["access-control-allow-origin"] == "http://localhost:3000"
    assert reply.headers["access-control-allow-private-network"] == "true"
    assert "authorization" in reply.headers["access-control-allow-headers"]
    for origin in (EVIL, "null"):
        reply = await preflight(client, origin, **private)
        assert reply.status_code == 400
        assert not {"access-control-allow-origin", "access-control-allow-private-network"} & reply.headers.keys()
        assert "Origin" in reply.headers["vary"]


async def test_public_url_is_an_allowed_host_and_origin() -> None:
    async with visit(public_url="https://Audio.example/v1/") as (client, _):
        for host in ("audio.example", "audio.example:8000", "queue.audio.example", "AUDIO.example."):
            assert await is_allowed(client, Host=host)
        for origin in ("https://audio.example", "https://audio.example:443", *LOOPBACK[:1]):
            assert await is_allowed(client, Origin=origin)
        for origin in ("http://audio.example", "https://audio.example:8443", "https://a.audio.example", EVIL):
            assert not await is_allowed(client, Origin=origin)
        assert not await is_allowed(client, Host="a.audio.example")


async def test_further_hosts_and_origins_can_be_allowed() -> None:
    async with visit(allowed_hosts="audio, Inner.Example., [fd00::1]", cors_origins=[EVIL, "null"]) as (client, _):
        for host in ("audio:8000", "inner.example", "queue.inner.example:80", "localhost"):
            assert await is_allowed(client, Host=host)
        assert not await is_allowed(client, Host="x.inner.example")
        for origin in (EVIL, "null", "http://localhost:8000"):  # the last origin is the server's own
            assert await is_allowed(client, Origin=origin)
        assert not await is_allowed(client, Origin="http://localhost:3000")  # only listed origins are allowed
        assert (await preflight(client, EVIL)).headers["access-control-allow-origin"] == EVIL


async def test_all_hosts_and_origins_can_be_allowed() -> None:
    async with visit(allowed_hosts=["*"], cors_origins=["*"]) as (client, _):
        assert await is_allowed(client, Host="evil.example", Origin="null")
        assert (await preflight(client, EVIL)).headers["access-control-allow-origin"] == "*"
    async with visit(cors_origins=[]) as (client, _):
        assert not await is_allowed(client, Origin="http://localhost:3000")
        assert await is_allowed(client, Origin="http://localhost:8000")


async def test_with_keys_any_page_and_any_host_is_allowed() -> None:
    async with visit(key_hashes=[hash_key("key")]) as (client, _):
        foreign = {"Host": "evil.example", "Origin": EVIL}
        for path in (URL, "/jobs"):
            assert (await client.post(path, json=BODY, headers=foreign)).status_code == 401
            reply = await client.post(path, json=BODY, headers=foreign | {"Authorization": "Bearer key"})
            assert reply.status_code in (200, 202)
            assert reply.headers["access-control-allow-origin"] == "*"
        assert (await preflight(client, "null")).status_code == 200
    async with visit(key_hashes=[hash_key("key")], cors_origins=["https://a.example"]) as (client, _):
        assert not await is_allowed(client, Origin=EVIL, Authorization="Bearer key")
        assert await is_allowed(client, Origin="https://a.example", Authorization="Bearer key")
        assert await is_allowed(client, Host="b.example", Authorization="Bearer key")
    async with visit(key_hashes=[hash_key("key")], allowed_hosts=["a.example"]) as (client, _):
        assert not await is_allowed(client, Host="b.example", Authorization="Bearer key")
        assert await is_allowed(client, Host="a.example", Authorization="Bearer key")


_SIGNS = ["http://", "https://", "null", *".:@/\\?#% \t\0[]-_x0ⓛ", "80"]
_PIECES = st.sampled_from([*_SIGNS, "localhost", "127.0.0.1", "[::1]", "evil.example"])


@given(st.lists(_PIECES, max_size=8).map("".join))
def test_origin_cannot_be_spelled_as_local(origin: str) -> None:
    if Origins(ApiSettings()).allows(origin):
        host = urlsplit(origin).hostname or ""
        assert origin == f"{urlsplit(origin).scheme}://{urlsplit(origin).netloc}"
        assert host.removesuffix(".").endswith("localhost") or host in ("127.0.0.1", "::1")
        assert not host.endswith("evil.example")
