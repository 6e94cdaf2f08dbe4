"""Report parts of a request that have no effect: unknown fields, and the end of a prompt that the model does not read.

Responses name them in a header, and JSON responses in a field. The setting `api.unknown_fields` can make unknown fields
an error.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.requests import Request

from stable_audio_serve.api.middleware.observe import note
from stable_audio_serve.api.printable import printable
from stable_audio_serve.core.generation import MadeOn
from stable_audio_serve.core.settings import ApiSettings

WARNING = "Warning"
WARNING_HEADER: dict[str, Any] = {
    WARNING: {
        "schema": {"type": "string"},
        "description": 'Parts of the request without effect, comma-separated: `299 - "sentence"`.',
    }
}
_CODE = "299 -"  # 299 = "miscellaneous persistent warning"; "-" = no server name (RFC 7234)
_MOST_NAMES = 20
_MOST_CHARS = 50
_LONGEST = 1000  # characters per sentence, because proxies limit the size of headers


def check_names(
    request: Request, names: Iterable[str], *, limits: ApiSettings, parameters: Collection[str] = ()
) -> None:
    """Record the names that the response lists as ignored: the unknown fields `names` and unknown query parameters.

    A query parameter is unknown if it is not in `parameters`. Raises RequestValidationError if there are unknown names
    and the server is configured to refuse them.
    """
    unknown = [("body", name) for name in names]
    unknown += [("query", name) for name in request.query_params if name not in parameters]
    if not unknown:
        return
    if limits.unknown_fields == "refuse":
        message = "unknown field; remove it (api.unknown_fields is refuse)"
        raise RequestValidationError(
            [{"type": "extra_forbidden", "loc": place, "msg": message, "input": None} for place in unknown]
        )
    request.state.ignored = tuple(str(printable(name[:_MOST_CHARS])) for _, name in unknown[:_MOST_NAMES])
    note(request.scope, ignored=list(request.state.ignored))


def ignored_names(request: Request) -> tuple[str, ...]:
    """Return the names that `check_names` recorded: at most the first `_MOST_NAMES`."""
    names: tuple[str, ...] = getattr(request.state, "ignored", ())
    return names


def cut_prompts(made_on: MadeOn | None) -> list[str]:
    """Return a sentence for each prompt that the model did not read to its end."""
    provenance = made_on.provenance if made_on else None
    if provenance is None:
        return []
    read = {"prompt": provenance.prompt_chars, "negative_prompt": provenance.negative_prompt_chars}
    return [f"{name}: the model reads the first {chars} characters only" for name, chars in read.items() if chars]


def warning_headers(request: Request, made_on: MadeOn | None = None) -> dict[str, str]:
    """Return the header that names the parts of a request that have no effect, or {} if there are no such parts."""
    names = ignored_names(request)
    sentences = [f"unknown fields are ignored: {', '.join(names)}"] if names else []
    return _header([*sentences, *cut_prompts(made_on)])


def _header(sentences: Sequence[str]) -> dict[str, str]:
    plain = (sentence.encode("ascii", "backslashreplace").decode()[:_LONGEST] for sentence in sentences)
    shown = ("".join(char if char.isprintable() else "?" for char in sentence) for sentence in plain)
    quoted = (sentence.replace("\\", "\\\\").replace('"', '\\"') for sentence in shown)
    text = ", ".join(f'{_CODE} "{sentence}"' for sentence in quoted)
    return {WARNING: text} if text else {}
