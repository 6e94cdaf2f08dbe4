"""docs/openapi.md lists every route of the application, as `make docs` writes it."""

from __future__ import annotations

import re

from stable_audio_serve.api.app import create_app
from stable_audio_serve.api.offline import OfflineBackend
from stable_audio_serve.cli.routes_page import draw_page
from stable_audio_serve.core.settings import Settings
from tests.docs.blocks import DOCS


def test_page_lists_every_route() -> None:
    page = (DOCS / "openapi.md").read_text()
    document = create_app(OfflineBackend(), Settings()).openapi()
    assert page == draw_page(document), "make docs writes it"
    listed = {
        (method.lower(), path)
        for methods, path in re.findall(r"^\| `([A-Z, ]+) (/[^`]*)` \|", page, flags=re.MULTILINE)
        for method in methods.split(", ")
    }
    assert listed == {(method, path) for path, operations in document["paths"].items() for method in operations}
