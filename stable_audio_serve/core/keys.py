"""API keys: making a key, the line that a server stores for it, its client, scopes and limits.

A line holds the SHA-256 of a key, never the key. Independent of files and HTTP.
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

_PREFIX = "sas-"  # people and secret scanners recognise keys by it
_NUM_DIGITS = 16
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_UNNAMED = re.compile(rf"[0-9a-f]{{{_NUM_DIGITS}}}")
_MAX_CONCURRENCY = 1_000_000


@dataclass(frozen=True, slots=True)
class KeyLimits:
    """The limits of one client; None = unlimited. All keys of the same client name share them."""

    audio_seconds_per_minute: float | None = None
    concurrency: int | None = None


NO_LIMITS = KeyLimits()


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key that may use the API: the client that owns it, its SHA-256 in hexadecimal, and what it may do."""

    client: ClientId
    digest: str
    scopes: frozenset[Scope] = DEFAULT_SCOPES
    limits: KeyLimits = NO_LIMITS

    @property
    def label(self) -> str:
        """The client's name in logs and metrics; "unnamed" without a name, to reveal no part of the digest."""
        return "unnamed" if _UNNAMED.fullmatch(self.client) else self.client

    def may(self, scopes: Iterable[Scope]) -> bool:
        """Whether the key has at least one of these scopes."""
        return not self.scopes.isdisjoint(scopes)


# The key of every request if no keys are configured: all callers are one client, and none is an administrator.
ANYBODY = ApiKey(NO_CLIENT, "")


def parse_key(text: str) -> ApiKey:
    """Returns the key of a line: `digest` or `name:digest`, then any of `scope=`, `audio-seconds-per-minute=` and
    `concurrency=`, in any order, separated by spaces. The first digits of a digest are its default name.

    Raises ValueError for any other text, and for a name that looks like a default one. The message never quotes the
    text, because it may contain a plain key by mistake.
    """
    entry, *words = text.split()
    options: dict[str, str] = {}
    for number, word in enumerate(words, start=2):
        name, separator, value = word.partition("=")
        if not separator or name not in _OPTIONS:
            raise ValueError(f"word {number} must be one of {', '.join(f'{name}=' for name in _OPTIONS)}")
        if name in options:
            raise ValueError(f"{name} is there twice")
        options[name] = value
    client, digest = _parse_entry(entry)
    limits = KeyLimits(
        _parse_rate(options["audio-seconds-per-minute"]) if "audio-seconds-per-minute" in options else None,
        _parse_concurrency(options["concurrency"]) if "concurrency" in options else None,
    )
    scopes = parse_scopes(options["scope"].split(",")) if "scope" in options else DEFAULT_SCOPES
    return ApiKey(client, digest, scopes, limits)


def parse_key_hash(text: str) -> ApiKey:
    """Returns the key of a configured `digest` or `name:digest` alone. Raises ValueError like `parse_key`."""
    client, digest = _parse_entry(text)
    return ApiKey(client, digest)


def parse_scopes(words: Iterable[str]) -> frozenset[Scope]:
    """Returns the scopes with these names. Raises ValueError for an unknown name, and if there are no names."""
    found = {word.strip() for word in words}
    if not found or not found <= set(SCOPES):
        raise ValueError(f"scope must be one or several of {', '.join(SCOPES)}, separated by commas")
    return frozenset(cast(set[Scope], found))


def format_key(key: ApiKey, *, is_named: bool = True) -> str:
    """Returns the line that `parse_key` reads, without options that have their default."""
    words = [f"{key.client}:{key.digest}" if is_named else key.digest]
    if key.scopes != DEFAULT_SCOPES:
        words.append(f"scope={','.join(scope for scope in SCOPES if scope in key.scopes)}")
    if key.limits.audio_seconds_per_minute is not None:
        words.append(f"audio-seconds-per-minute={key.limits.audio_seconds_per_minute:g}")
    if key.limits.concurrency is not None:
        words.append(f"concurrency={key.limits.concurrency}")
    return " ".join(words)


def make_key() -> str:
    """Returns a new key of 256 random bits.

    Nobody can find such a key from its SHA-256 by trying, so no slower hash is needed.
    """
    return _PREFIX + secrets.token_urlsafe(32)


def hash_key(key: str | bytes) -> str:
    """Returns the SHA-256 of a key in hexadecimal; text is encoded as UTF-8."""
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
        raise ValueError(f"a name must not be {_NUM_DIGITS} hexadecimal digits: keys without a name are called so")
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
