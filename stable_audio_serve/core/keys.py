"""Create API keys, and read and write the text lines that describe them in settings and key files.

A line contains the SHA-256 of a key (never the key itself), the name of the client, scopes and limits.
"""

from __future__ import annotations

import hashlib
import math
import re
import secrets
from collections.abc import Iterable
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
        """Whether the key has at least one of these scopes."""
        return not self.scopes.isdisjoint(scopes)


# If no keys are configured, every request is treated as if it had this key, which does not have the scope admin.
ANYBODY = ApiKey(NO_CLIENT, "")


def parse_key(text: str) -> ApiKey:
    """Parse a line of the key file: `digest` or `name:digest`, then options.

    The options are `scope=`, `audio-seconds-per-minute=` and `concurrency=`, in any order, separated by spaces. Without
    a name, the client's name is the first 16 digits of the digest. Therefore a name must not consist of 16 hexadecimal
    digits. Raises ValueError for an invalid line. Its message does not quote the line, because the line may contain a
    key in plain text by mistake.
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
