"""Parts of a request that have no effect: unknown fields, and the end of a prompt that is longer than a model reads.

Answers name them in a header and, where they are JSON, in a field. `api.unknown_fields` may refuse unknown fields.
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
        "description": 'What had no effect: `299 - "sentence"`, several with commas.',
    }
}
_CODE = "299 -"  # a lasting warning of an unnamed server (RFC 7234)
_MOST_NAMES = 20
_MOST_CHARS = 50
_LONGEST = 1000  # characters of a sentence in the header, which proxies limit


def check_names(
    request: Request, names: Iterable[str], *, limits: ApiSettings, parameters: Collection[str] = ()
) -> None:
    """Keep the names of a request's unknown fields, and of query parameters beside `parameters`, for the answer.

    Raises RequestValidationError where the server refuses them.
    """
    unknown = [("body", name) for name in names]
    unknown += [("query", name) for name in request.query_params if name not in parameters]
    if not unknown:
        return
    if limits.unknown_fields == "refuse":
        message = "there is no such field (api.unknown_fields is refuse)"
        raise RequestValidationError(
            [{"type": "extra_forbidden", "loc": place, "msg": message, "input": None} for place in unknown]
        )
    request.state.ignored = tuple(str(printable(name[:_MOST_CHARS])) for _, name in unknown[:_MOST_NAMES])
    note(request.scope, ignored=list(request.state.ignored))


def ignored_names(request: Request) -> tuple[str, ...]:
    """Returns the names that `check_names` kept, the first of them where there are many."""
    names: tuple[str, ...] = getattr(request.state, "ignored", ())
    return names


def cut_prompts(made_on: MadeOn | None) -> list[str]:
    """Returns a sentence for each prompt whose end the model did not read."""
    making = made_on.making if made_on else None
    if making is None:
        return []
    read = {"prompt": making.prompt_chars, "negative_prompt": making.negative_prompt_chars}
    return [f"{name}: the model reads the first {chars} characters only" for name, chars in read.items() if chars]


def warning_headers(request: Request, made_on: MadeOn | None = None) -> dict[str, str]:
    """Returns the header that names the parts of a request without effect, {} where there are none."""
    names = ignored_names(request)
    sentences = [f"unknown fields are ignored: {', '.join(names)}"] if names else []
    return _header([*sentences, *cut_prompts(made_on)])


def _header(sentences: Sequence[str]) -> dict[str, str]:
    plain = (sentence.encode("ascii", "backslashreplace").decode()[:_LONGEST] for sentence in sentences)
    shown = ("".join(char if char.isprintable() else "?" for char in sentence) for sentence in plain)
    quoted = (sentence.replace("\\", "\\\\").replace('"', '\\"') for sentence in shown)
    text = ", ".join(f'{_CODE} "{sentence}"' for sentence in quoted)
    return {WARNING: text} if text else {}
