"""Identify the client of a request, for limits per client: by its API key, or without keys by its address."""

from __future__ import annotations

import ipaddress
from typing import NamedTuple

from starlette.requests import Request

from stable_audio_serve.core.keys import ANYBODY, ApiKey

_IPV6_BITS = 64  # IPv6 addresses with the same first 64 bits count as one client, because they belong to one network


class Caller(NamedTuple):
    """The API key of a request, and the name of its client. A client cannot change the name with request headers."""

    key: ApiKey
    name: str


def find_caller(request: Request, key: ApiKey, *, address_header: str | None) -> Caller:
    """Return the caller of a request. `address_header` is the header in which a proxy sends the client's address."""
    return Caller(key, _network(_address(request, address_header)) if key is ANYBODY else key.client)


def _address(request: Request, header: str | None) -> str:
    if header is not None and (passed_on := request.headers.get(header)):
        return passed_on
    return request.client.host if request.client else ""


def _network(address: str) -> str:
    parsed = to_address(address)
    if parsed is None or parsed.version == 4:
        return str(parsed or address)
    return str(ipaddress.ip_network((parsed, _IPV6_BITS), strict=False))


def to_address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Return the IP address that a host name consists of, or None. `::ffff:127.0.0.1` gives the IPv4 address."""
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address
