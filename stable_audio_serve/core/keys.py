"""API keys: making one, and the digest that is all a server keeps of it."""

from __future__ import annotations

import hashlib
import secrets

_PREFIX = "sas-"  # so that scanners and people recognise one


def make_key() -> str:
    """A new key of 256 random bits."""
    return _PREFIX + secrets.token_urlsafe(32)


def hash_key(key: str | bytes) -> str:
    """SHA-256 of a key, in hexadecimal; text counts as UTF-8."""
    return hashlib.sha256(key.encode() if isinstance(key, str) else key).hexdigest()
