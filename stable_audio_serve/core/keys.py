"""Create API keys, read and write the text lines that describe them, and read files of such lines.

A line contains the SHA-256 of a key (never the key itself), the name of the client, scopes and limits. In a file, empty
lines and `#` comments are allowed. `api.middleware.key_ring` decides when to read the file again. Error messages never
quote a line, because the line may contain a key in plain text by mistake.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import secrets
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

from stable_audio_serve.core.ids import NO_CLIENT, ClientId

Scope = Literal["generate", "jobs", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
DEFAULT_SCOPES: frozenset[Scope] = frozenset({"generate", "jobs"})

_PREFIX = "sas-"  # people and secret scanners recognise keys by this prefix
_NUM_DIGITS = 16
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_UNNAMED = re.compile(rf"[0-9a-f]{{{_NUM_DIGITS}}}")
_MAX_CONCURRENCY = 1_000_000
_MAX_FILE_BYTES = 16_777_216


@dataclass(frozen=True, slots=True)
class KeyLimits:
    """The limits of one client. None means no limit. The limits apply to all keys of the client together."""

    audio_seconds_per_minute: float | None = None
    concurrency: int | None = None


NO_LIMITS = KeyLimits()


@dataclass(frozen=True, slots=True)
class ApiKey:
    """An API key: the client that it belongs to, its SHA-256 in hexadecimal, its scopes and limits."""

    client: ClientId
    digest: str
    scopes: frozenset[Scope] = DEFAULT_SCOPES
    limits: KeyLimits = NO_LIMITS

    @property
    def label(self) -> str:
        """The client's name in logs and metrics, or "unnamed" if the key was configured without a name."""
        return "unnamed" if _UNNAMED.fullmatch(self.client) else self.client

    def may(self, scopes: Iterable[Scope]) -> bool:
        return not self.scopes.isdisjoint(scopes)


# If no keys are configured, every request is treated as if it had this key, which does not have the scope admin.
ANYBODY = ApiKey(NO_CLIENT, "")


def parse_key(text: str) -> ApiKey:
    """Parse a line of the key file: `digest` or `name:digest`, then options.

    The options are `scope=`, `audio-seconds-per-minute=` and `concurrency=`, in any order, separated by spaces. Without
    a name, the client's name is the first 16 digits of the digest. Therefore a name must not consist of 16 hexadecimal
    digits. Raises ValueError for an invalid line.
    """
    entry, *words = text.split()
    options: dict[str, str] = {}
    for number, word in enumerate(words, start=2):
        name, separator, value = word.partition("=")
        if not separator or name not in _OPTIONS:
            raise ValueError(f"word {number} must be one of {', '.join(f'{name}=' for name in _OPTIONS)}")
        if name in options:
            raise ValueError(f"{name} appears twice")
        options[name] = value
    client, digest = _parse_entry(entry)
    limits = KeyLimits(
        _parse_rate(options["audio-seconds-per-minute"]) if "audio-seconds-per-minute" in options else None,
        _parse_concurrency(options["concurrency"]) if "concurrency" in options else None,
    )
    scopes = parse_scopes(options["scope"].split(",")) if "scope" in options else DEFAULT_SCOPES
    return ApiKey(client, digest, scopes, limits)


def parse_key_hash(text: str) -> ApiKey:
    """Parse an entry of the setting `api.key_hashes`: `digest` or `name:digest`. Raises ValueError like `parse_key`."""
    client, digest = _parse_entry(text)
    return ApiKey(client, digest)


def parse_scopes(words: Iterable[str]) -> frozenset[Scope]:
    """Return the scopes with these names. Raises ValueError for an unknown name, and if there are no names."""
    found = {word.strip() for word in words}
    if not found or not found <= set(SCOPES):
        raise ValueError(f"scope must be one or several of {', '.join(SCOPES)}, separated by commas")
    return frozenset(cast(set[Scope], found))


def format_key(key: ApiKey, *, is_named: bool = True) -> str:
    """Return the line of the key file that describes `key`. `parse_key` parses it. Default values are left out.

    If `is_named` is false, the line has no client name.
    """
    words = [f"{key.client}:{key.digest}" if is_named else key.digest]
    if key.scopes != DEFAULT_SCOPES:
        words.append(f"scope={','.join(scope for scope in SCOPES if scope in key.scopes)}")
    if key.limits.audio_seconds_per_minute is not None:
        rate = repr(key.limits.audio_seconds_per_minute).removesuffix(".0")
        words.append(f"audio-seconds-per-minute={rate}")
    if key.limits.concurrency is not None:
        words.append(f"concurrency={key.limits.concurrency}")
    return " ".join(words)


def read_key_file(path: str) -> bytes:
    """Return the content of the key file.

    Raises OSError if it cannot be read, and ValueError if it is not a regular file or is too large.
    """
    # O_NONBLOCK: if the path is a named pipe, opening it would otherwise block until another process writes to it.
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("it is not a regular file")
        data = file.read(_MAX_FILE_BYTES + 1)
    if len(data) > _MAX_FILE_BYTES:
        raise ValueError(f"it is larger than {_MAX_FILE_BYTES} bytes")
    return data


def parse_key_file(data: bytes) -> tuple[ApiKey, ...]:
    """Return the keys in the content of a key file. Raises ValueError, which names the invalid line.

    An empty file is invalid, because most likely another program is about to write the file. A file that has only a
    comment is valid and contains no key.
    """
    if not data:
        raise ValueError("it is empty")
    try:
        lines = data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8 text") from None
    keys: list[ApiKey] = []
    digests: dict[str, int] = {}
    limits: dict[str, tuple[KeyLimits, int]] = {}
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        try:
            key = parse_key(text)
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None
        if (first := digests.setdefault(key.digest, number)) != number:
            raise ValueError(f"lines {first} and {number} are the same key")
        known, first = limits.setdefault(key.client, (key.limits, number))
        if known != key.limits:
            raise ValueError(f"lines {first} and {number} set different limits for the same name")
        keys.append(key)
    return tuple(keys)


def merge_keys(configured: Sequence[ApiKey], listed: Sequence[ApiKey]) -> dict[str, ApiKey]:
    """Return the API keys of the settings (`configured`) and of the key file (`listed`), by the keys' digests.

    If the settings and the file contain the same key, the entry of the file applies. The limits that the file sets for
    a client also apply to the client's keys in the settings.
    """
    limits = {key.client: key.limits for key in listed}
    own = [ApiKey(key.client, key.digest, key.scopes, limits.get(key.client, key.limits)) for key in configured]
    return {key.digest: key for key in (*own, *listed)}


def make_key() -> str:
    """Return a new key of 256 random bits.

    A key of this length cannot be found from its SHA-256 by trial. Therefore a slow password hash is not needed.
    """
    return _PREFIX + secrets.token_urlsafe(32)


def hash_key(key: str | bytes) -> str:
    """Return the SHA-256 of a key in hexadecimal. Text is encoded as UTF-8."""
    return hashlib.sha256(key.encode() if isinstance(key, str) else key).hexdigest()


_OPTIONS = ("scope", "audio-seconds-per-minute", "concurrency")


def _parse_entry(text: str) -> tuple[ClientId, str]:
    name, separator, digest = text.rpartition(":")
    if not _DIGEST.fullmatch(digest):
        raise ValueError("must be the SHA-256 of a key, 64 lower-case hexadecimal digits, or name:SHA-256")
    if not separator:
        return ClientId(digest[:_NUM_DIGITS]), digest
    if not _NAME.fullmatch(name):
        raise ValueError(
            "a name must be 1 to 64 letters, digits, dots, dashes or underscores, beginning with a letter or digit"
        )
    if _UNNAMED.fullmatch(name):
        raise ValueError(f"a name must not be {_NUM_DIGITS} hexadecimal digits, because keys without a name use these")
    return ClientId(name), digest


def _parse_rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not 1 <= rate < 1e9:
        raise ValueError("audio-seconds-per-minute must be a number from 1 to 1e9")
    return rate


def _parse_concurrency(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and 1 <= int(text) <= _MAX_CONCURRENCY):
        raise ValueError(f"concurrency must be a whole number from 1 to {_MAX_CONCURRENCY}")
    return int(text)
