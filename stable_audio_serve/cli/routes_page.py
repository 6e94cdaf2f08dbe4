"""docs/openapi.md, made from the OpenAPI description of the application (`make docs`)."""

from __future__ import annotations

from typing import Any

_HEAD = """# All routes

{description}

`stable-audio-serve openapi` prints the whole description as an OpenAPI document: every field with its type, range and
default, every answer and every error. A running server has it at `/openapi.json`, as a page to try out at `/docs`, and
as one to read at `/redoc`.

This page is made from that description by `make docs`.
"""


def draw_page(document: dict[str, Any]) -> str:
    """Returns the page in Markdown for an OpenAPI document."""
    head = _HEAD.format(description=document["info"]["description"])
    return head + "".join(_draw_group(tag, document["paths"]) for tag in document["tags"])


def _draw_group(tag: dict[str, str], paths: dict[str, dict[str, Any]]) -> str:
    rows = [f"| `{methods} {path}` | {does} |" for path in paths for methods, does in _rows(paths[path], tag["name"])]
    head = (f"\n## {tag['name']}\n", f"{tag['description']}\n", "| Route | Does |", "|---|---|")
    return "\n".join((*head, *rows, ""))


def _rows(operations: dict[str, Any], tag: str) -> list[tuple[str, str]]:
    """Methods and what they do; those that do the same share a row."""
    methods: dict[str, list[str]] = {}
    for method, operation in operations.items():
        if tag in operation["tags"]:
            methods.setdefault(_first_sentence(operation), []).append(method.upper())
    return [(", ".join(names), does) for does, names in methods.items()]


def _first_sentence(operation: dict[str, Any]) -> str:
    text = " ".join(operation.get("description", "").split("\n\n")[0].split())
    sentence, _, _ = text.partition(". ")
    return (sentence.rstrip(".") or operation["summary"]).replace("|", "\\|") + "."
