"""API keys: how one is made, the digest that the server keeps of it, and the client it belongs to."""

from __future__ import annotations

import hashlib
import re
import secrets
from typing import NamedTuple

from stable_audio_serve.core.ids import ClientId

_PREFIX = "sas-"  # makes keys easy to recognise for people and secret scanners


_NUM_DIGITS = 16
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_UNNAMED = re.compile(rf"[0-9a-f]{{{_NUM_DIGITS}}}")


class KeyHash(NamedTuple):
    """A key that may use the API: the client that owns it, and its SHA-256 in hexadecimal."""

    client: ClientId
    digest: str


def parse_key_hash(text: str) -> KeyHash:
    """Returns a configured `digest` or `name:digest` as a KeyHash. The first digits of a digest are its default name.

    Raises ValueError for any other text, and for a name that looks like a default one.
    """
    name, separator, digest = text.rpartition(":")
    if not _DIGEST.fullmatch(digest):
        raise ValueError("must be the SHA-256 of a key, 64 lower-case hexadecimal digits, or name:SHA-256")
    if not separator:
        return KeyHash(ClientId(digest[:_NUM_DIGITS]), digest)
    if not _NAME.fullmatch(name):
        raise ValueError(
            "a name must be 1 to 64 letters, digits, dots, dashes or underscores, beginning with a letter or digit"
        )
    if _UNNAMED.fullmatch(name):
        raise ValueError(f"a name must not be {_NUM_DIGITS} hexadecimal digits: keys without a name are called so")
    return KeyHash(ClientId(name), digest)


def make_key() -> str:
    """Returns a new key of 256 random bits."""
    return _PREFIX + secrets.token_urlsafe(32)


def hash_key(key: str | bytes) -> str:
    """Returns the SHA-256 of a key in hexadecimal; text is encoded as UTF-8."""
    return hashlib.sha256(key.encode() if isinstance(key, str) else key).hexdigest()
