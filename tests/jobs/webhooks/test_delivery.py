from __future__ import annotations

import asyncio
import io
import json
import os
import socket
import ssl
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import trustme

from stable_audio_serve.core.errors import InvalidRequestError
from stable_audio_serve.jobs.webhooks import delivery
from stable_audio_serve.jobs.webhooks.delivery import DeliveryError, check_webhook_url, download, post_json
from tests.patience import PATIENCE_S
from tests.webhook_receiver import receiving

ALLOWED = ("127.0.0.1",)
_NO_CONTENT = b"HTTP/1.1 204 No Content\r\n\r\n"


async def test_body_arrives_unchanged() -> None:
    async with receiving() as receiver:
        await post_json(receiver.url, b'{"a": "\xc3\xa4"}', allow_hosts=ALLOWED)
    first, headers, body = receiver.requests[0]
    assert first == "POST /hook?a=b HTTP/1.1"
    assert headers["content-type"] == "application/json"
    assert headers["host"] == f"127.0.0.1:{receiver.port}"
    assert json.loads(body) == {"a": "ä"}


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n",
        b"no HTTP at all\r\n\r\n",
        b"",
    ],
)
async def test_any_status_but_2xx_is_a_failed_delivery(answer: bytes) -> None:
    async with receiving(answer=answer) as receiver:
        with pytest.raises(DeliveryError):
            await post_json(receiver.url, b"{}", allow_hosts=ALLOWED)
    assert len(receiver.requests) == 1


async def test_redirects_are_not_followed() -> None:
    async with receiving() as other:
        answer = f"HTTP/1.1 307 Go\r\nLocation: {other.url}\r\nContent-Length: 0\r\n\r\n".encode()
        async with receiving(answer=answer) as receiver:
            with pytest.raises(DeliveryError, match="307"):
                await post_json(receiver.url, b"{}", allow_hosts=ALLOWED)
    assert other.num_connections == 0


async def test_endless_answer_is_not_read() -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000000\r\n\r\n"
    async with receiving(answer=head + b"x" * 10_000_000) as receiver, asyncio.timeout(PATIENCE_S):
        await post_json(receiver.url, b"{}", allow_hosts=ALLOWED)


async def test_few_interim_answers_are_skipped() -> None:
    async with receiving(answer=b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" * 10 + _NO_CONTENT) as receiver:
        await post_json(receiver.url, b"{}", allow_hosts=ALLOWED)


async def test_endless_interim_answers_end_the_delivery() -> None:
    """Otherwise, one receiver could keep the process from other work, because parsing them takes much time."""
    async with receiving(answer=b"HTTP/1.1 100 Continue\r\n\r\n" * 50_000 + _NO_CONTENT) as receiver:
        with pytest.raises(DeliveryError, match="too many headers"):
            await post_json(receiver.url, b"{}", allow_hosts=ALLOWED)


@pytest.fixture
def rereads_certificates() -> Iterator[None]:
    """Each test that sets other certificates reads them, and leaves none to later tests."""
    delivery.tls_context.cache_clear()
    yield
    delivery.tls_context.cache_clear()


@pytest.mark.usefixtures("rereads_certificates")
async def test_certificates_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading them takes up to 90 ms, in which the process does nothing else."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(context)
    make = Mock(wraps=ssl.create_default_context)
    monkeypatch.setattr(ssl, "create_default_context", make)
    async with await asyncio.start_server(lambda *_: None, "127.0.0.1", 0, ssl=context) as server:
        for _ in range(3):
            with pytest.raises(DeliveryError, match="certificate verify failed"):
                await post_json(f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}/", b"{}", allow_hosts=ALLOWED)
    make.assert_called_once()


@pytest.mark.usefixtures("rereads_certificates")
async def test_large_file_arrives_over_https(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "authority.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "authority.pem"))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    content, got = os.urandom(1_000_000), io.BytesIO()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n" + content)
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0, ssl=context) as server, asyncio.timeout(PATIENCE_S):
        url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}/a.wav"
        await download(url, got, max_bytes=len(content), allow_hosts=ALLOWED)
    assert got.getvalue() == content


async def test_silent_server_costs_a_bounded_time() -> None:
    async with receiving(delay_s=PATIENCE_S) as receiver, asyncio.timeout(PATIENCE_S):
        with pytest.raises(DeliveryError, match="time"):
            await post_json(receiver.url, b"{}", allow_hosts=ALLOWED, timeout_s=0.1)


async def test_refused_connection_is_a_failed_delivery() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(DeliveryError):
        await post_json(f"http://127.0.0.1:{port}/", b"{}", allow_hosts=ALLOWED)


PRIVATE = [
    "127.0.0.1",
    "127.1",
    "2130706433",
    "0x7f000001",
    "0177.0.0.1",
    "localhost",
    "LOCALHOST.",
    "0.0.0.0",
    "0",
    "10.0.0.1",
    "172.16.3.4",
    "192.168.1.1",
    "100.64.0.1",
    "169.254.169.254",
    "192.0.0.192",
    "198.18.0.1",
    "168.63.129.16",
    "100.100.100.200",
    "[fd20:ce::254]",
    "[::ffff:0:7f00:1]",
    "0x7f.1",
    "017700000001",
    "127.0.1",
    "224.0.0.1",
    "255.255.255.255",
    "240.0.0.1",
    "192.0.2.1",
    "[::1]",
    "[::]",
    "[::ffff:127.0.0.1]",
    "[::ffff:a9fe:a9fe]",
    "[::127.0.0.1]",
    "[fe80::1]",
    "[fc00::1]",
    "[fd00:ec2::254]",
    "[fec0::1]",
    "[ff02::1]",
    "[2002:7f00:1::]",
    "[64:ff9b::a00:1]",
    "[64:ff9b:1::1]",
    "redis",
    "hooks.local",
    "metadata.google.internal",
    "x.localhost",
    "[2001:db8::1]",
    "[2001:0:4136:e378:8000:63bf:3fff:fdd2]",
]


async def test_private_addresses_are_refused_in_every_spelling() -> None:
    accepted = []
    for url in (f"{scheme}://{host}:8080/hook" for scheme in ("http", "https") for host in PRIVATE):
        try:
            await check_webhook_url(url, field="fal_webhook")
        except InvalidRequestError as error:
            named = (error.field, "fal_webhook" in error.message)
        else:
            named = (None, False)
        if named != ("fal_webhook", True):
            accepted.append(url)
    assert accepted == []


@pytest.mark.parametrize("host", ["8.8.8.8", "[2606:4700:4700::1111]", "93.184.216.34:8443", "[::ffff:8.8.8.8]"])
async def test_public_addresses_are_accepted(host: str) -> None:
    await check_webhook_url(f"https://{host}/hook", field="webhook_url")


@pytest.mark.parametrize(
    "url",
    [
        "",
        "hook",
        "/hook",
        "ftp://8.8.8.8/",
        "file:///etc/passwd",
        "gopher://8.8.8.8/",
        "http://",
        "https:///x",
        "http://8.8.8.8:99999/",
        "http://user:secret@8.8.8.8/",
        "http://8.8.8.8/\n",
        "http://8.8.8.8\r\nX: y/",
        "javascript:alert(1)",
        "http://[::1",
        "//8.8.8.8/",
        "https://8.8.8.8/" + "x" * 3000,
        "http://a b/",
        "http://8.8.8.8:0/",
    ],
)
async def test_invalid_urls_are_refused(url: str) -> None:
    with pytest.raises(InvalidRequestError, match="fal_webhook"):
        await check_webhook_url(url, field="fal_webhook", allow_hosts=("8.8.8.8",))


@pytest.mark.parametrize(
    ("allowed", "host"),
    [("127.0.0.1", "127.0.0.1"), ("LocalHost", "localhost"), ("localhost", "LOCALHOST."), ("[::1]", "[::1]")],
)
async def test_allowed_hosts_may_be_private(allowed: str, host: str) -> None:
    await check_webhook_url(f"http://{host}:9/x", field="webhook_url", allow_hosts=(allowed,))


async def test_allowed_name_does_not_allow_its_address_or_other_names() -> None:
    for host in ("127.0.0.1", "localhost.example.localhost"):
        with pytest.raises(InvalidRequestError):
            await check_webhook_url(f"http://{host}/", field="webhook_url", allow_hosts=("localhost",))


async def test_unresolvable_name_is_checked_at_delivery(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise socket.gaierror("unknown")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    await check_webhook_url("https://hooks.example.com/", field="webhook_url")
    with pytest.raises(DeliveryError, match="resolved"):
        await post_json("https://hooks.example.com/", b"{}")


@pytest.mark.parametrize("answers", [["127.0.0.1"], ["93.184.216.34", "127.0.0.1"], ["::ffff:10.0.0.1"]])
async def test_name_that_became_private_is_not_called(monkeypatch: pytest.MonkeyPatch, answers: list[str]) -> None:
    async with receiving() as receiver:
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, receiver.port)) for address in answers]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
        with pytest.raises(DeliveryError, match="public"):
            await post_json(f"http://rebound.example.com:{receiver.port}/", b"{}")
    assert receiver.num_connections == 0


async def test_connection_goes_to_a_checked_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host name is looked up only once, because a second lookup could return an address that is not allowed."""
    resolve, lookups = socket.getaddrinfo, []

    async with receiving() as receiver:

        def answer(host: str, *args: Any, **kwargs: Any) -> Any:
            if host == "flaky.example.com":
                lookups.append(host)
                return resolve("127.0.0.1" if len(lookups) == 1 else "127.0.0.9", *args, **kwargs)
            return resolve(host, *args, **kwargs)

        monkeypatch.setattr(socket, "getaddrinfo", answer)
        url = f"http://flaky.example.com:{receiver.port}/"
        await post_json(url, b"{}", allow_hosts=("flaky.example.com",))
    assert lookups == ["flaky.example.com"]
    assert receiver.requests[0][1]["host"] == f"flaky.example.com:{receiver.port}"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ignores connections to a full socket")
async def test_address_that_does_not_answer_is_left_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "_ADDRESS_TIMEOUT_S", 0.2)
    with socket.socket() as silent, socket.socket() as first, socket.socket() as second:
        async with receiving() as receiver:
            silent.bind(("127.0.0.9", receiver.port))
            silent.listen(0)
            for full in (first, second):
                full.setblocking(False)
                full.connect_ex(silent.getsockname())
            hosts = (silent.getsockname()[0], "127.0.0.1")
            found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, receiver.port)) for host in hosts]
            monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
            await post_json(f"http://two.example.com:{receiver.port}/", b"{}", allow_hosts=("two.example.com",))
        assert receiver.num_connections == 1


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="needs IPv6")
async def test_host_header_of_an_ipv6_address_has_brackets() -> None:
    async with receiving(host="::1") as receiver:
        await post_json(f"http://[::1]:{receiver.port}/", b"{}", allow_hosts=("::1",))
    assert receiver.requests[0][1]["host"] == f"[::1]:{receiver.port}"


async def test_slow_name_servers_delay_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: released.wait())
    checks = [
        asyncio.create_task(
            check_webhook_url(f"https://slow{number}.example.com/", field="webhook_url", resolve_timeout_s=0.2)
        )
        for number in range(40)
    ]
    await asyncio.sleep(0.05)
    try:
        async with asyncio.timeout(PATIENCE_S):
            assert await asyncio.to_thread(lambda: not released.is_set())
            await asyncio.gather(*checks)
    finally:
        released.set()
