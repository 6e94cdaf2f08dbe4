"""Who a request is from, for what several clients share: the client of its key, or without keys the address."""

from __future__ import annotations

import ipaddress
from typing import NamedTuple

from starlette.requests import Request

from stable_audio_serve.core.keys import ANYBODY, ApiKey

_IPV6_BITS = 64  # of an address that name a network: one client has all addresses in it


class Caller(NamedTuple):
    """The key of a request, and a name that no header of the client's own can change."""

    key: ApiKey
    name: str


def find_caller(request: Request, key: ApiKey, *, address_header: str | None) -> Caller:
    """`address_header` is the one in which the proxy before this process passes the client's address on, if any."""
    return Caller(key, _network(_address(request, address_header)) if key is ANYBODY else key.client)


def _address(request: Request, header: str | None) -> str:
    if header is not None and (passed_on := request.headers.get(header)):
        return passed_on
    return request.client.host if request.client else ""


def _network(address: str) -> str:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    mapped = getattr(parsed, "ipv4_mapped", None)
    if parsed.version == 4 or mapped:
        return str(mapped or parsed)
    return str(ipaddress.ip_network((parsed, _IPV6_BITS), strict=False))
