"""Who may use the API: everybody, or clients with one of the configured keys."""

from __future__ import annotations

import hmac
from collections.abc import Sequence

from starlette.requests import Request

from stable_audio_serve.core.errors import UnauthorizedError
from stable_audio_serve.core.ids import NO_CLIENT, ClientId
from stable_audio_serve.core.keys import hash_key, parse_key_hash

_SCHEMES = frozenset({"bearer", "key"})


class ApiKeys:
    """Admits requests by their `Authorization` header, `Bearer <key>` or `Key <key>`; without hashes, all of them."""

    def __init__(self, hashes: Sequence[str]) -> None:
        self._hashes = [parse_key_hash(text) for text in hashes]

    def admit(self, request: Request) -> ClientId:
        """Returns the client of the request's key, '' where no keys are configured. Raises UnauthorizedError."""
        client = self.find(request)
        if client is None:
            raise UnauthorizedError("Authorization: a valid API key is required, as `Bearer <key>` or `Key <key>`")
        return client

    def find(self, request: Request) -> ClientId | None:
        """Returns the client like `admit`, but None for a request without a valid key."""
        if not self._hashes:
            return NO_CLIENT
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        digest = hash_key(key.strip().encode("latin-1"))  # Starlette decoded the header this way
        # Compares with all of them, so that the time says nothing about the key.
        matches = [known.client for known in self._hashes if hmac.compare_digest(digest, known.digest)]
        return matches[0] if matches and scheme.lower() in _SCHEMES else None
