"""Who may use the API: everybody, or whoever brings one of the configured keys."""

from __future__ import annotations

import hmac
from collections.abc import Sequence

from starlette.requests import Request

from stable_audio_serve.core.errors import UnauthorizedError
from stable_audio_serve.core.keys import hash_key

_SCHEMES = frozenset({"bearer", "key"})
_CLIENT_DIGITS = 16


class ApiKeys:
    """Admits requests by their `Authorization` header, `Bearer <key>` or `Key <key>`; without hashes, all of them."""

    def __init__(self, hashes: Sequence[str]) -> None:
        self._hashes = tuple(hashes)

    def admit(self, request: Request) -> str:
        """Whose the request is: the first digits of its key's SHA-256, nothing where no keys are configured.

        Raises UnauthorizedError unless it may pass.
        """
        if not self._hashes:
            return ""
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        digest = hash_key(key.strip().encode("latin-1"))  # how header bytes became text
        matches = [hmac.compare_digest(digest, known) for known in self._hashes]  # all of them: equal time for each
        if scheme.lower() not in _SCHEMES or not any(matches):
            raise UnauthorizedError("Authorization: a valid API key is required, as `Bearer <key>` or `Key <key>`")
        return digest[:_CLIENT_DIGITS]
