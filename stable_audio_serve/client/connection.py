"""Where the server is and how its calls become HTTP requests: shared by both clients. Sends nothing."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from stable_audio_serve.client.calls import Call

DEFAULT_URL = "http://127.0.0.1:8000"
URL_VARIABLE = "STABLE_AUDIO_URL"
KEY_VARIABLE = "STABLE_AUDIO_API_KEY"
_LAST_PORT = 65535
USER_AGENT = "stable-audio-serve-client"
# A generation answers once it is done: how long that takes the server decides, within its own deadlines.
TIMEOUT = httpx.Timeout(600.0, connect=10.0)
# A stream of events carries a comment every ten seconds.
STREAM_TIMEOUT = httpx.Timeout(30.0, connect=10.0)


@dataclass(frozen=True, slots=True)
class Connection:
    """A server's address and the caller's key, which is sent to this server only."""

    base_url: httpx.URL
    api_key: str | None

    @classmethod
    def choose(cls, base_url: str | None, api_key: str | None) -> Connection:
        """Returns the connection to a server that is named here or in the environment. Raises ValueError."""
        text = base_url or os.environ.get(URL_VARIABLE) or DEFAULT_URL
        try:
            url = httpx.URL(text)
            is_server = url.scheme in {"http", "https"} and url.host and (url.port or 0) <= _LAST_PORT
        except (httpx.InvalidURL, UnicodeError) as error:
            raise ValueError(f"{text!r} is no URL: {error}") from error
        if not is_server:
            raise ValueError(f"{text!r} is no URL of a server, such as {DEFAULT_URL}")
        url = url.copy_with(path=url.path.rstrip("/") + "/", query=None, fragment=None)
        key = api_key or os.environ.get(KEY_VARIABLE) or None
        if key is not None and not (key.isascii() and key.isprintable() and key == key.strip()):
            raise ValueError("the API key has white space around it, or characters that no header can carry")
        return cls(url, key)

    def request(self, call: Call) -> dict[str, Any]:
        """Returns the arguments of httpx's `request` for a call."""
        return {
            "method": call.method,
            "url": self.url(call.path),
            "params": dict(call.params) or None,
            "headers": self.headers(call.headers),
            "json": call.json,
            "data": call.form,
            "files": call.files,
        }

    def url(self, path: str) -> httpx.URL:
        """Returns the URL of a path of the API, which may lie below a path of the server."""
        return self.base_url.join(path.lstrip("/"))

    def headers(self, more: Mapping[str, str] | None = None) -> dict[str, str]:
        """Returns the headers of a request to this server."""
        key = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        return {"User-Agent": USER_AGENT, **key, **(more or {})}
