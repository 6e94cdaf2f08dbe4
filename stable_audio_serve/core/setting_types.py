"""Types of single settings: how their values are parsed and checked, and which parts are hidden when they are shown."""

from __future__ import annotations

import base64
import binascii
import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainSerializer, SecretStr
from pydantic_core import PydanticCustomError

from stable_audio_serve.core.catalog import ADAPTER_NAME
from stable_audio_serve.core.keys import parse_key_hash

Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Delay = Annotated[float, Field(ge=0, allow_inf_nan=False)]


def _form(pattern: str, words: str) -> AfterValidator:
    """Return a validator that accepts text if all of it matches `pattern`. Its error is "must be", then `words`."""

    def check(text: str) -> str:
        if re.fullmatch(pattern, text) is None:
            raise PydanticCustomError("form", "must be {words}", {"words": words})
        return text

    return AfterValidator(check)


Device = Annotated[str, _form(r"cuda(:\d+)?|mps|cpu", "cuda, cuda:N, mps or cpu")]
Hidden = PlainSerializer(lambda values: ["**********"] * len(values), when_used="json")
Url = Annotated[str, _form(r"https?://[^\s?#]+", "an http:// or https:// URL without query")]
PlainUrl = Annotated[str, _form(r"https?://[^\s?#@]+", "an http:// or https:// URL without user, password and query")]
Origin = Annotated[
    str,
    _form(
        r"\*|null|[A-Za-z][A-Za-z0-9+.-]*://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:\d{1,5})?",
        "*, null, or a scheme and a host as in https://app.example:8443",
    ),
]
HostName = Annotated[
    str, _form(r"\*|[A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]+\]", "* or the name of a host, without a port")
]
ListenHost = Annotated[str, _form(r"[0-9A-Za-z.:%_-]+", "an address or a host name")]
ProxyKind = Literal["auto", "haproxy", "python"]
UnknownFields = Literal["ignore", "refuse"]
ReportId = Annotated[str, _form(r"[0-9a-f]{32}", "32 hexadecimal digits")]
ModelName = Annotated[str, Field(min_length=1, max_length=200)]
NewModelName = Annotated[
    str,
    _form(
        r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}",
        "1 to 64 letters, digits, dots, dashes and underscores, a letter or digit first",
    ),
]
AdapterName = Annotated[
    str,
    _form(ADAPTER_NAME, "1 to 100 printable characters without colons, plus signs and slashes, no space first or last"),
]
Folder = Annotated[str, _form(r"[^\x00]+", "a folder's path")]
FileName = Annotated[str, _form(r"[^\x00]+", "a file's path")]


def _without_secrets(url: str | None) -> str | None:
    """Return a URL without its user, password and query. The query is removed because it may contain a password too."""
    if url is None:
        return None
    scheme, separator, rest = url.partition("://")
    place = re.sub(r"^.*@", "**********@", rest)
    return f"{scheme}://{place.partition('?')[0]}" if separator else "**********"


HiddenPassword = PlainSerializer(_without_secrets, when_used="json")


def split_commas(value: object) -> object:
    """Split comma-separated text into a list. Return any other value unchanged."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def trim_prefix(prefix: str) -> str:
    """Remove leading and trailing slashes from a prefix of S3 keys. Raises ValueError for parts named `.` or `..`."""
    trimmed = prefix.strip("/")
    if {".", ".."} & set(trimmed.split("/")):
        raise ValueError("must not have . or .. between slashes, because clients remove these from links")
    return trimmed


def check_key_hashes(texts: tuple[str, ...]) -> tuple[str, ...]:
    """Return `texts` unchanged. Raises ValueError if an entry is not the hash of an API key, or appears twice."""
    digests = [parse_key_hash(text).digest for text in texts]
    for number, digest in enumerate(digests, start=1):
        if (first := digests.index(digest) + 1) < number:
            raise ValueError(f"entries {first} and {number} are the same key")
    return texts


def check_signing_secret(secret: SecretStr) -> SecretStr:
    """Return `secret` unchanged. Raises ValueError unless it has the format of a Standard Webhooks signing secret."""
    try:
        key = base64.b64decode(secret.get_secret_value().removeprefix("whsec_"), validate=True)
    except binascii.Error:
        key = b""
    if not 24 <= len(key) <= 64:
        raise ValueError("must be whsec_ followed by 24 to 64 bytes in base64")
    return secret


class Section(BaseModel):
    """Base of every section. Sections are frozen and refuse unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")
