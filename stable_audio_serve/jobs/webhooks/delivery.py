"""Send webhooks to URLs that clients choose, and download files from such URLs.

Clients cannot reach the private network in this way, because a host must have only public addresses or be in
`allow_hosts`.

The host name is resolved once, all its addresses are checked, and the connection goes to a checked address. Redirects
and proxies are not used, and the total time is limited.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import cache
from typing import IO, Any
from weakref import WeakValueDictionary

import httpcore
import httpx

from stable_audio_serve.core.errors import InvalidRequestError
from stable_audio_serve.core.private_files import needing_room

DELIVERY_TIMEOUT_S = 15.0
DOWNLOAD_TIMEOUT_S = 60.0
RESOLVE_TIMEOUT_S = 3.0
_ADDRESS_TIMEOUT_S = 3.0
# Most bytes of a response's headers, with the interim responses (1xx) before it.
_MAX_HEAD_BYTES = 32_768

_MAX_URL_CHARACTERS = 2048
_MAX_SOURCE_URL_CHARACTERS = 8192  # presigned links to buckets may contain a long token
_MAX_REDIRECTS = 5
_REDIRECTS = (301, 302, 303, 307, 308)
_HOST = re.compile(r"[A-Za-z0-9._-]{1,253}|[0-9A-Fa-f:.]{2,45}")
_PRIVATE_NAMES = (".localhost", ".local", ".localdomain", ".internal", ".home.arpa")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
# Further addresses that are not allowed: some for which `is_global` is true in some Python versions, and the last, a
# public address at which Azure offers internal services.
_NOT_PUBLIC = tuple(
    ipaddress.ip_network(network)
    for network in ("192.0.0.0/24", "192.88.99.0/24", "64:ff9b:1::/48", "fec0::/10", "168.63.129.16/32")
)

# Host names are resolved in a thread pool for each client, because a client's name server may be slow. Then only this
# client's webhooks and downloads are delayed. A pool is in this dictionary while it is in use.
_RESOLVERS: WeakValueDictionary[str, ThreadPoolExecutor] = WeakValueDictionary()
_MAX_LOOKUPS_PER_CLIENT = 16

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class DeliveryError(Exception):
    """A webhook was not delivered, or a file not downloaded. The message has the reason."""


class _ForbiddenTargetError(DeliveryError):
    """The URL or its host is not allowed. The message has the reason."""


async def check_webhook_url(
    url: str,
    *,
    field: str,
    client: str = "",
    allow_hosts: Collection[str] = (),
    resolve_timeout_s: float = RESOLVE_TIMEOUT_S,
) -> None:
    """Raise InvalidRequestError unless `url` is an http or https URL whose host has only public addresses.

    The error names `field` as the invalid field. `client` is the name of the client that sent the URL. A host in
    `allow_hosts` may have any address. If the host cannot be resolved now, no error is raised, because `post_json`
    checks the addresses again.
    """
    try:
        target = _parse(url)
        if not _is_allowed(target.host, allow_hosts):
            _require_public_name(target.host)
            _require_public(await _resolve(target.host, target.port, client=client, timeout_s=resolve_timeout_s))
    except _ForbiddenTargetError as error:
        allowed = "an http or https URL on a public address"
        raise InvalidRequestError(f"{field} {error}; allowed: {allowed}", field=field, allowed=allowed) from error
    except DeliveryError:
        return


async def post_json(
    url: str,
    body: bytes,
    *,
    headers: Mapping[str, str] | None = None,
    client: str = "",
    allow_hosts: Collection[str] = (),
    timeout_s: float = DELIVERY_TIMEOUT_S,
) -> None:
    """Send a POST request with a JSON body. `client` is the name of the client that chose the URL.

    Raises DeliveryError unless a response with a 2xx status arrives within `timeout_s` seconds.
    """
    target = _parse(url)
    own_headers = {"Host": target.netloc, "Content-Type": "application/json", "User-Agent": "stable-audio-serve"}
    all_headers = own_headers | dict(headers or {})
    async with (
        _explained(timeout_s),
        httpcore.AsyncConnectionPool(
            tls_context(), network_backend=_CheckedNetwork(allow_hosts, client=client)
        ) as pool,
        pool.stream("POST", target.url, headers=list(all_headers.items()), content=body) as answer,
    ):
        status = answer.status
    if not 200 <= status < 300:
        raise DeliveryError(f"answered with status {status}")


async def download(
    url: str,
    into: IO[bytes],
    *,
    max_bytes: int,
    count: Callable[[int], None] = lambda num_bytes: None,
    client: str = "",
    allow_hosts: Collection[str] = (),
    timeout_s: float = DOWNLOAD_TIMEOUT_S,
) -> None:
    """Write the file at `url`, at most `max_bytes` long, to `into`. `count` is called with the size of each part.
    `client` is the name of the client that chose the URL. At most `_MAX_REDIRECTS` redirects are followed, and the host
    of each is checked.

    Raises DeliveryError unless the whole file arrives with status 200 within `timeout_s` seconds.
    """
    async with _explained(timeout_s):
        for _ in range(_MAX_REDIRECTS + 1):
            target = _parse(url, most=_MAX_SOURCE_URL_CHARACTERS)
            headers = {"Host": target.netloc, "User-Agent": "stable-audio-serve", "Accept-Encoding": "identity"}
            network = _CheckedNetwork(allow_hosts, client=client)
            async with (
                httpcore.AsyncConnectionPool(tls_context(), network_backend=network) as pool,
                pool.stream("GET", target.url, headers=list(headers.items())) as answer,
            ):
                location = httpx.Headers(answer.headers).get("location")
                if answer.status in _REDIRECTS and location is not None:
                    url = _join(target.url, location)
                    continue
                if answer.status != 200:
                    raise DeliveryError(f"answered with status {answer.status}")
                network.has_answer = True
                await _receive(answer, into, max_bytes=max_bytes, count=count)
                return
    raise DeliveryError(f"redirects more than {_MAX_REDIRECTS} times")


async def _receive(answer: httpcore.Response, into: IO[bytes], *, max_bytes: int, count: Callable[[int], None]) -> None:
    num_bytes = 0
    async for chunk in answer.aiter_stream():
        num_bytes += len(chunk)
        if num_bytes > max_bytes:
            raise DeliveryError(f"is larger than {max_bytes} bytes")
        count(len(chunk))
        with needing_room():
            into.write(chunk)


@cache
def tls_context() -> ssl.SSLContext:
    """Return the TLS settings of all connections. Reading the trusted certificates takes up to 90 ms of CPU time."""
    return httpcore.default_ssl_context()


@asynccontextmanager
async def _explained(timeout_s: float) -> AsyncIterator[None]:
    """Limit a request to `timeout_s` seconds. Raise DeliveryError in place of a timeout or a network error."""
    try:
        async with asyncio.timeout(timeout_s):
            yield
    except (TimeoutError, httpcore.TimeoutException) as error:
        raise DeliveryError("gave no answer in time") from error
    except (httpcore.NetworkError, httpcore.ProtocolError, OSError) as error:
        what = "cannot be reached" if isinstance(error, httpcore.ConnectError) else "gave no complete answer"
        raise DeliveryError(f"{what}: {error}" if str(error) else what) from error


@dataclass(frozen=True, slots=True)
class _Target:
    url: str
    host: str
    port: int
    netloc: str  # for the header Host


def _join(url: str, location: str) -> str:
    """Return the URL to which the header Location of a response from `url` points."""
    try:
        return str(httpx.URL(url).join(location))
    except (httpx.InvalidURL, UnicodeError, ValueError) as error:
        raise DeliveryError("redirects to an invalid URL") from error


def _parse(url: str, *, most: int = _MAX_URL_CHARACTERS) -> _Target:
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, UnicodeError, ValueError) as error:
        raise _ForbiddenTargetError("is not a URL") from error
    if len(url) > most:
        raise _ForbiddenTargetError(f"is longer than {most} characters")
    host = parsed.raw_host.decode("ascii")
    if parsed.scheme not in ("http", "https") or not _HOST.fullmatch(host):
        raise _ForbiddenTargetError("is not an http or https URL with a host")
    if parsed.userinfo:
        raise _ForbiddenTargetError("must not carry a user name or password")
    port = parsed.port if parsed.port is not None else 443 if parsed.scheme == "https" else 80
    if not 0 < port < 65536:
        raise _ForbiddenTargetError("has no valid port")
    return _Target(str(parsed.copy_with(fragment=None)), host, port, parsed.netloc.decode("ascii"))


def _is_allowed(host: str, allow_hosts: Collection[str]) -> bool:
    return host.lower().rstrip(".") in {allowed.lower().rstrip(".").strip("[]") for allowed in allow_hosts}


async def _resolve(host: str, port: int, *, client: str, timeout_s: float = RESOLVE_TIMEOUT_S) -> list[_Address]:
    """Return all addresses of a host. Raises DeliveryError if the host cannot be resolved."""
    loop = asyncio.get_running_loop()
    pool = _RESOLVERS.get(client)
    if pool is None:
        pool = _RESOLVERS[client] = ThreadPoolExecutor(_MAX_LOOKUPS_PER_CLIENT, thread_name_prefix="resolver")
    try:
        async with asyncio.timeout(timeout_s):
            found = await loop.run_in_executor(pool, _look_up, host, port, pool)
    except (OSError, TimeoutError, UnicodeError) as error:
        raise DeliveryError("has a host that cannot be resolved") from error
    # An IPv6 address may end in a percent sign and a zone id, which are removed.
    return [ipaddress.ip_address(str(address[0]).partition("%")[0]) for *_, address in found]


def _look_up(host: str, port: int, _: ThreadPoolExecutor) -> list[Any]:
    """Call `getaddrinfo`. The last argument keeps the pool in `_RESOLVERS`, also after the caller stopped waiting."""
    return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)


def _require_public_name(host: str) -> None:
    """Raise _ForbiddenTargetError for a host name that can only be resolved in a private network."""
    name = host.lower().rstrip(".")
    if ":" not in name and ("." not in name or name.endswith(_PRIVATE_NAMES)):
        raise _ForbiddenTargetError("leads to a name that is not public")


def _require_public(addresses: Iterable[_Address]) -> None:
    """Raise _ForbiddenTargetError if any of a host's addresses is not public: the connection may go to any of them."""
    if not all(_is_public(address) for address in addresses):
        raise _ForbiddenTargetError("leads to an address that is not public")


def _is_public(address: _Address) -> bool:
    embedded = _embedded(address)
    if embedded is not None:
        return _is_public(embedded)
    if any(address in network for network in _NOT_PUBLIC):
        return False
    return address.is_global and not (address.is_multicast or address.is_reserved or address.is_unspecified)


def _embedded(address: _Address) -> ipaddress.IPv4Address | None:
    """Return the IPv4 address to which packets to this IPv6 address are tunnelled, or None if they are not."""
    if isinstance(address, ipaddress.IPv4Address):
        return None
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)
    teredo = address.teredo[1] if address.teredo else None
    return address.ipv4_mapped or address.sixtofour or teredo


class _CheckedNetwork(httpcore.AsyncNetworkBackend):
    """Resolves a host name, checks all its addresses, and connects to one of them.

    The name is not resolved a second time, because it might then have other addresses, which were not checked.
    """

    def __init__(self, allow_hosts: Collection[str], *, client: str) -> None:
        self._allow_hosts = allow_hosts
        self._client = client
        self._network = httpcore.AnyIOBackend()
        self.has_answer = False  # set this when the headers of the response have arrived

    async def connect_tcp(  # noqa: PLR0917 - as httpcore has it
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109   # httpcore's own signature
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Return a connection to the first address of the host that answers. All addresses but the last have
        `_ADDRESS_TIMEOUT_S` seconds for this.

        Raises DeliveryError and httpcore's errors.
        """
        is_allowed = _is_allowed(host, self._allow_hosts)
        if not is_allowed:
            _require_public_name(host)
        addresses = await _resolve(host, port, client=self._client)
        if not is_allowed:
            _require_public(addresses)
        for address in addresses[:-1]:
            with suppress(httpcore.ConnectError, httpcore.ConnectTimeout):
                stream = await self._network.connect_tcp(
                    str(address), port, _ADDRESS_TIMEOUT_S, local_address, socket_options
                )
                return _CheckedStream(stream, self)
        stream = await self._network.connect_tcp(str(addresses[-1]), port, timeout, local_address, socket_options)
        return _CheckedStream(stream, self)


class _CheckedStream(httpcore.AsyncNetworkStream):
    """A connection that reads at most `_MAX_HEAD_BYTES` before the response has arrived. Then it raises DeliveryError.

    Otherwise, interim responses without end could keep this process from other work, because it takes long to parse
    them.
    """

    def __init__(self, stream: httpcore.AsyncNetworkStream, network: _CheckedNetwork) -> None:
        self._stream = stream
        self._network = network
        self._bytes_left = _MAX_HEAD_BYTES

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ASYNC109
        if self._network.has_answer:
            return await self._stream.read(max_bytes, timeout)
        if not self._bytes_left:
            raise DeliveryError("sends too many headers")
        data = await self._stream.read(min(max_bytes, self._bytes_left), timeout)
        self._bytes_left -= len(data)
        return data

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ASYNC109
        await self._stream.write(buffer, timeout)

    async def aclose(self) -> None:
        await self._stream.aclose()

    async def start_tls(  # noqa: PLR0917 - as httpcore has it
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ASYNC109
    ) -> httpcore.AsyncNetworkStream:
        return _CheckedStream(await self._stream.start_tls(ssl_context, server_hostname, timeout), self._network)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)
