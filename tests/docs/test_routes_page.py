"""docs/openapi.md is up to date with what `make docs` writes, and lists every route of the application."""

from __future__ import annotations

import re

from docs.reference import describe_api, draw_routes
from tests.docs.blocks import DOCS


def test_page_lists_every_route() -> None:
    page = (DOCS / "openapi.md").read_text()
    document = describe_api()
    assert page == draw_routes(document), "make docs writes it"
    listed = {
        (method.lower(), path)
        for methods, path in re.findall(r"^\| `([A-Z, ]+) (/[^`]*)` \|", page, flags=re.MULTILINE)
        for method in methods.split(", ")
    }
    assert listed == {(method, path) for path, operations in document["paths"].items() for method in operations}
