"""Authenticate requests by their API key. If no keys are configured, all requests are allowed."""

from __future__ import annotations

from starlette.requests import Request

from stable_audio_serve.api.middleware.key_ring import KeyRing
from stable_audio_serve.core.errors import ForbiddenError, KeysUnavailableError, UnauthorizedError
from stable_audio_serve.core.keys import ANYBODY, ApiKey, Scope, hash_key

_SCHEMES = frozenset({"bearer", "key"})
ELEVENLABS_HEADER = "xi-api-key"
_MAX_KEY = 4096  # longest key that is checked, characters; the keys that we generate have 47
_RETRY_S = 5.0


class ApiKeys:
    """Checks the key of requests: `Authorization: Bearer <key>`, `Authorization: Key <key>` or `xi-api-key: <key>`."""

    def __init__(self, ring: KeyRing) -> None:
        self.ring = ring

    def admit(self, request: Request, scopes: tuple[Scope, ...], *, takes_bare_key: bool = False) -> ApiKey:
        """Return the request's key, or `ANYBODY` if no keys are configured. If `scopes` is empty, any key is accepted.

        Raises UnauthorizedError if the request has no valid key, and ForbiddenError if its key has none of `scopes`.
        Raises KeysUnavailableError if the key file has never been read successfully.
        """
        key = self.find(request, takes_bare_key=takes_bare_key)
        if key is None and self.ring.health.state == "unread":
            raise KeysUnavailableError("the key file cannot be read; retry later", retry_after_s=_RETRY_S)
        if key is None:
            forms = f"as `Bearer <key>` or `Key <key>`, or in the header {ELEVENLABS_HEADER}"
            raise UnauthorizedError(f"Authorization: send a valid API key, {forms}")
        if scopes and not key.may(scopes):
            needed = " or ".join(scopes)
            if key is ANYBODY:
                raise ForbiddenError(f"this route needs a key with the scope {needed}, but no keys are configured")
            raise ForbiddenError(f"Authorization: this key lacks the scope {needed}, which this route needs")
        return key

    def find(self, request: Request, *, takes_bare_key: bool = False) -> ApiKey | None:
        """Return the request's key, or None if the request has no valid key.

        With `takes_bare_key`, the header Authorization may also have the key without `Bearer` or `Key`.
        """
        if self.ring.is_open:
            return ANYBODY
        scheme, sent = sent_key(request, takes_bare_key=takes_bare_key)
        if scheme.lower() not in _SCHEMES or not sent or len(sent) > _MAX_KEY:
            return None
        digest = hash_key(sent.encode("latin-1"))  # Starlette decodes headers as latin-1
        # The duration of the look-up depends on the digest of the sent key only, and reveals nothing about other keys.
        return self.ring.keys.get(digest)


def sent_key(request: Request, *, takes_bare_key: bool = False) -> tuple[str, str]:
    """Return the scheme and the key of the header Authorization, or `Bearer` and the key of `xi-api-key`.

    The latter counts only if Authorization has no key. Some clients always send an Authorization header, which is then
    empty after the scheme.
    """
    header = request.headers.get("authorization", "").strip()
    if takes_bare_key and header and " " not in header and header.lower() not in _SCHEMES:
        header = f"Bearer {header}"
    scheme, _, key = header.partition(" ")
    other = request.headers.get(ELEVENLABS_HEADER, "").strip()
    if other and not (scheme.lower() in _SCHEMES and key):
        return "Bearer", other
    return scheme, key.strip()
