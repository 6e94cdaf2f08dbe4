"""Protect the server from foreign web pages: check the origin of pages and the host name of requests.

If no keys are configured, any page that is open in a browser of this machine or network could use the server. A page
could send forms to the server; the Origin header of such a request names the page's origin. Or the page could be loaded
from a DNS name that points to this server; the Host header then has this name.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Sequence
from typing import NamedTuple
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from stable_audio_serve.api.middleware.callers import to_address
from stable_audio_serve.api.printable import printable
from stable_audio_serve.core.errors import ForbiddenError
from stable_audio_serve.core.settings import ApiSettings

ANY = "*"

_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
_PORTS = {"http": 80, "https": 443}
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::(\d{0,5}))?")
_ORIGIN = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/?#]+)")
_QUEUE = "queue."  # host prefix of fal's queue


class _Host(NamedTuple):
    name: str  # in lower case, without brackets and without a trailing dot
    port: int | None


class _Origin(NamedTuple):
    scheme: str
    host: _Host


class Origins:
    """The origins and host names that the settings allow."""

    def __init__(self, settings: ApiSettings) -> None:
        origins, hosts = settings.cors_origins, settings.allowed_hosts
        if origins is None and settings.has_keys:
            origins = (ANY,)  # safe, because a foreign page has no key, and browsers have no cookies for this server
        public_url = settings.public_url
        self.allows_all = origins is not None and ANY in origins
        self._allows_loopback = origins is None
        listed = origins if origins is not None else [public_url] if public_url else []
        self._allowed = {_parse_origin(_without_path(origin)) for origin in listed} - {None}
        self._allows_null = "null" in listed
        self._checks_hosts = ANY not in hosts and (bool(hosts) or not settings.has_keys)
        own_name = socket.gethostname().lower()
        short_name = own_name.partition(".")[0]
        public_name = urlsplit(public_url).hostname if public_url else None
        self._names = {*map(_plain_name, hosts), own_name, short_name, f"{short_name}.local", public_name} - {"", None}

    def allows(self, origin: str) -> bool:
        """Whether pages of this origin may read responses."""
        if self.allows_all:
            return True
        if origin == "null":
            return self._allows_null
        parsed = _parse_origin(origin)
        if parsed is None:
            return False
        is_loopback = self._allows_loopback and parsed.scheme in _PORTS and _is_loopback(parsed.host.name)
        return is_loopback or parsed in self._allowed

    def admit(self, request: Request) -> None:
        """Raise ForbiddenError for a foreign host name, and for a foreign page's request that is not read-only.

        X-Forwarded-Host is ignored, because pages can set it.
        """
        hosts = request.headers.getlist("host")
        if self._checks_hosts:
            for host in hosts:  # requests without a Host header are accepted
                if host and not self._is_ours(host):
                    raise ForbiddenError(
                        f"Host: {_shown(host)} is not a known name of this server; add it to api.allowed_hosts"
                    )
        if request.method in _SAFE_METHODS:
            return
        for origin in request.headers.getlist("origin"):
            if not self.allows(origin) and not any(_is_same(origin, host) for host in hosts):
                raise ForbiddenError(
                    f"Origin: pages of {_shown(origin)} may not use this server; add it to api.cors_origins"
                )

    def _is_ours(self, text: str) -> bool:
        host = _parse_host(text)
        return host is not None and any(map(self._is_name_ours, {host.name, host.name.removeprefix(_QUEUE)}))

    def _is_name_ours(self, name: str) -> bool:
        return _is_local_name(name) or name in self._names or to_address(name) is not None


class OriginsMiddleware(CORSMiddleware):
    """Sends CORS headers for the origins that `Origins` allows."""

    def __init__(self, app: ASGIApp, *, origins: Origins, exposed_headers: Sequence[str]) -> None:
        super().__init__(
            app,
            allow_origins=(ANY,) if origins.allows_all else (),
            allow_methods=(ANY,),
            allow_headers=(ANY,),
            allow_private_network=True,
            expose_headers=exposed_headers,
        )
        self._origins = origins

    def is_allowed_origin(self, origin: str) -> bool:
        return self._origins.allows(origin)

    def preflight_response(self, request_headers: Headers) -> Response:
        response = super().preflight_response(request_headers)
        if response.status_code != 200:
            del response.headers["Access-Control-Allow-Private-Network"]
        return response


def _parse_host(text: str) -> _Host | None:
    found = _HOST.fullmatch(text)
    return None if found is None else _Host(_plain_name(found[1]), int(found[2]) if found[2] else None)


def _plain_name(text: str) -> str:
    name = text.lower().strip("[]").removesuffix(".")
    address = to_address(name)
    return name if address is None else str(address)


def _parse_origin(text: str) -> _Origin | None:
    found = _ORIGIN.fullmatch(text)
    host = _parse_host(found[2]) if found else None
    if found is None or host is None:
        return None
    scheme = found[1].lower()
    return _Origin(scheme, _Host(host.name, host.port or _PORTS.get(scheme)))


def _without_path(url: str) -> str:
    return "/".join(url.split("/", 3)[:3])


def _is_same(origin: str, host: str) -> bool:
    """Whether the page with this origin was loaded from `host`, the host of its request.

    The scheme is ignored, because behind a proxy the server does not know its own scheme.
    """
    page, own = _parse_origin(origin), _parse_host(host)
    if page is None or own is None or page.scheme not in _PORTS:
        return False
    return page.host == own._replace(port=own.port or _PORTS[page.scheme])


def _is_loopback(name: str) -> bool:
    address = to_address(name)
    return _is_local_name(name) if address is None else address.is_loopback


def _is_local_name(name: str) -> bool:
    return name == "localhost" or name.endswith(".localhost")


def _shown(text: str) -> str:
    return str(printable(text[:100]))
