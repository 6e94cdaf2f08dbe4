from __future__ import annotations

import pytest
from starlette.requests import Request

from stable_audio_serve.api.links import base_url
from stable_audio_serve.core.settings import ApiSettings


def make_request(*, scheme: str = "http", root_path: str = "", **headers: str) -> Request:
    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "scheme": scheme, "path": "/x", "root_path": root_path, "query_string": b""}
    return Request({**scope, "headers": raw, "server": ("10.0.0.7", 8000)})


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"host": "localhost:8000"}, "http://localhost:8000"),
        ({"host": "[::1]:8000"}, "http://[::1]:8000"),
        ({"host": "inner:8000", "x_forwarded_host": "audio.example.org"}, "http://audio.example.org"),
        ({"host": "inner", "x_forwarded_host": "a.example, b.example"}, "http://a.example"),
        ({"host": "a.example", "x_forwarded_proto": "https"}, "https://a.example"),
        ({"host": "a.example", "x_forwarded_proto": "HTTPS, http"}, "https://a.example"),
        ({"host": "a.example", "x_forwarded_proto": "javascript"}, "http://a.example"),
        ({"host": "a.example", "x_forwarded_host": "evil.example/path?"}, "http://a.example"),
        ({"host": "user@a.example"}, "http://10.0.0.7:8000"),
        ({}, "http://10.0.0.7:8000"),
    ],
)
def test_links_use_the_host_of_the_request(headers: dict[str, str], expected: str) -> None:
    assert base_url(make_request(**headers), ApiSettings()) == expected


def test_scheme_and_mount_path_are_kept() -> None:
    assert base_url(make_request(scheme="https", root_path="/audio", host="a"), ApiSettings()) == "https://a/audio"


def test_public_url_overrides_every_header() -> None:
    limits = ApiSettings(public_url="https://audio.example.org/v/")
    assert base_url(make_request(host="a", x_forwarded_host="b"), limits) == "https://audio.example.org/v"
