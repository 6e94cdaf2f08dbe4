"""Types of single settings: a value's form and bounds, how it is parsed, and which part is hidden when it is shown."""

from __future__ import annotations

import base64
import binascii
import re
from typing import Annotated, Literal

from pydantic import Field, PlainSerializer, SecretStr

from stable_audio_serve.core.keys import parse_key_hash

Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Delay = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Device = Annotated[
    str, Field(pattern=r"^(cuda(:\d+)?|mps|cpu)$", json_schema_extra={"form": "cuda, cuda:N, mps or cpu"})
]
Hidden = PlainSerializer(lambda values: ["**********"] * len(values), when_used="json")
Url = Annotated[
    str, Field(pattern=r"^https?://[^\s?#]+$", json_schema_extra={"form": "an http:// or https:// URL without query"})
]
PlainUrl = Annotated[
    str,
    Field(
        pattern=r"^https?://[^\s?#@]+$",
        json_schema_extra={"form": "an http:// or https:// URL without user, password and query"},
    ),
]
Origin = Annotated[
    str,
    Field(
        pattern=r"^(\*|null|[A-Za-z][A-Za-z0-9+.-]*://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:\d{1,5})?)$",
        json_schema_extra={"form": "*, null, or a scheme and a host as in https://app.example:8443"},
    ),
]
HostName = Annotated[
    str,
    Field(
        pattern=r"^(\*|[A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]+\])$",
        json_schema_extra={"form": "* or the name of a host, without a port"},
    ),
]
ProxyKind = Literal["auto", "haproxy", "python"]
UnknownFields = Literal["ignore", "refuse"]
ReportId = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$", json_schema_extra={"form": "32 hexadecimal digits"})]
ModelName = Annotated[str, Field(min_length=1, max_length=200)]
Folder = Annotated[str, Field(min_length=1, pattern=r"^[^\x00]+$", json_schema_extra={"form": "a folder's path"})]

FileName = Annotated[str, Field(min_length=1, pattern=r"^[^\x00]+$", json_schema_extra={"form": "a file's path"})]


def _without_secrets(url: str | None) -> str | None:
    """Returns a URL without user, password and query: a query may hold passwords too."""
    if url is None:
        return None
    scheme, separator, rest = url.partition("://")
    place = re.sub(r"^.*@", "**********@", rest)
    return f"{scheme}://{place.partition('?')[0]}" if separator else "**********"


HiddenPassword = PlainSerializer(_without_secrets, when_used="json")


def split_commas(value: object) -> object:
    """Returns comma-separated text as a list, anything else unchanged."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def trim_prefix(prefix: str) -> str:
    """Returns a key prefix without slashes at its ends. Raises ValueError for one that cannot be part of a link."""
    trimmed = prefix.strip("/")
    if {".", ".."} & set(trimmed.split("/")):
        raise ValueError("must not have . or .. between slashes: clients leave them out of links")
    return trimmed


def check_key_hashes(texts: tuple[str, ...]) -> tuple[str, ...]:
    """Returns `texts`. Raises ValueError for an entry that is no hash of a key or appears twice."""
    digests = [parse_key_hash(text).digest for text in texts]
    for number, digest in enumerate(digests, start=1):
        if (first := digests.index(digest) + 1) < number:
            raise ValueError(f"entries {first} and {number} are the same key")
    return texts


def check_signing_secret(secret: SecretStr) -> SecretStr:
    """Returns `secret`. Raises ValueError unless it is a secret of Standard Webhooks."""
    try:
        key = base64.b64decode(secret.get_secret_value().removeprefix("whsec_"), validate=True)
    except binascii.Error:
        key = b""
    if not 24 <= len(key) <= 64:
        raise ValueError("must be whsec_ and the base64 form of 24 to 64 bytes")
    return secret
