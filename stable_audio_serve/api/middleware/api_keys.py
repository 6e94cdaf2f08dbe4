"""Who may use the API: everybody, or clients with one of the configured keys; and what each key may do."""

from __future__ import annotations

import hmac

from starlette.requests import Request

from stable_audio_serve.api.middleware.key_ring import KeyRing
from stable_audio_serve.core.errors import ForbiddenError, KeysUnavailableError, UnauthorizedError
from stable_audio_serve.core.keys import ANYBODY, ApiKey, Scope, hash_key

_SCHEMES = frozenset({"bearer", "key"})
_MAX_KEY = 4096  # characters; ours have 47
_RETRY_S = 5.0
_NOBODY = hash_key("")


class ApiKeys:
    """Admits requests by their `Authorization` header, `Bearer <key>` or `Key <key>`; without keys, all of them."""

    def __init__(self, ring: KeyRing) -> None:
        self.ring = ring

    def admit(self, request: Request, scopes: tuple[Scope, ...]) -> ApiKey:
        """Returns the request's key, `ANYBODY` where no keys are configured.

        Raises UnauthorizedError without one, ForbiddenError when it has none of these scopes; empty = any key may.
        KeysUnavailableError means that the file of keys has never been read.
        """
        key = self.find(request)
        if key is None and self.ring.health.state == "unread":
            raise KeysUnavailableError("the file of keys cannot be read", retry_after_s=_RETRY_S)
        if key is None:
            raise UnauthorizedError("Authorization: a valid API key is required, as `Bearer <key>` or `Key <key>`")
        if scopes and not key.may(scopes):
            needed = " or ".join(scopes)
            if key is ANYBODY:
                raise ForbiddenError(f"this route needs a key with the scope {needed}, and no keys are configured")
            raise ForbiddenError(f"Authorization: this key has not the scope that this route needs, {needed}")
        return key

    def find(self, request: Request) -> ApiKey | None:
        """Returns the key like `admit`, but None for a request without a valid one."""
        if self.ring.is_open:
            return ANYBODY
        scheme, _, sent = request.headers.get("authorization", "").partition(" ")
        sent = sent.strip()
        if scheme.lower() not in _SCHEMES or len(sent) > _MAX_KEY:
            return None
        digest = hash_key(sent.encode("latin-1"))  # Starlette decoded the header this way
        # The time of the look-up depends on the digest, which says nothing about any other key.
        known = self.ring.keys.get(digest)
        is_it = hmac.compare_digest(digest, known.digest if known else _NOBODY)
        return known if known and is_it else None
