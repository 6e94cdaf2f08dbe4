"""The description of the server for language models, in the form of llms.txt (https://llmstxt.org)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stable_audio_serve.core.catalog import ModelCatalog

_FOR_PEOPLE = {"Pages", "Operators"}  # a program can generate audio without operations that have these tags


def describe(document: Mapping[str, Any], catalog: ModelCatalog, *, base: str) -> str:
    """Return Markdown that names the models and links each operation of the OpenAPI description `document`.

    `base` is the server's URL.
    """
    lines = [f"# {document['info']['title']}", "", f"> {document['info']['description']}", ""]
    names = ", ".join(f"`{card.name}` (up to {card.max_duration_s:g} s)" for card in catalog)
    lines += [
        f"Models: {names}. The default is `{catalog.default.name}`. Clients need a key only if the server has keys."
    ]
    for tag in document["tags"]:
        if tag["name"] in _FOR_PEOPLE:
            continue
        lines += ["", f"## {tag['name']}", "", tag["description"], ""]
        for path, operations in document["paths"].items():
            for method, operation in operations.items():
                if tag["name"] in operation["tags"]:
                    link = f"{base}/docs#/{tag['name']}/{operation['operationId']}".replace(" ", "%20")
                    text = str(operation.get("description", operation["summary"])).partition("\n")[0]
                    lines.append(f"- [{method.upper()} {path}]({link}): {text}")
    lines += ["", "## Optional", "", f"- [OpenAPI]({base}/openapi.json): every field, range and error", ""]
    return "\n".join(lines)
