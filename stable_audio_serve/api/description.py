"""The API's OpenAPI description: what FastAPI derives from the routes, corrected where that is wrong.

FastAPI announces a 422 of its own form for every operation with a parameter, says that parameters and form fields may
be null, and does not know our keys.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

_AUTOMATIC = "HTTPValidationError"
_ERRORS = {
    401: "Keys are configured and none of them was sent.",
    403: "The key lacks a scope, a web page of another origin asks, or the host is none of this server's.",
    408: "The body did not arrive in time.",
    413: "The upload or the body is too large.",
    429: "A limit of this caller is used up; Retry-After says when to come again.",
    500: "A failure inside.",
    503: "No room now, or the model is not ready; Retry-After says when to come again.",
    504: "The time budget ran out.",
    507: "There is no room left to keep it.",
}
_SECURITY_SCHEMES = {
    # One only: in a page's form for several, people fill in the wrong one.
    "Bearer": {
        "type": "http",
        "scheme": "bearer",
        "description": "An API key, where keys are configured. The header may also be `Authorization: Key <key>`.",
    },
}


def error_responses(model: type[BaseModel], *statuses: int) -> dict[int | str, dict[str, Any]]:
    """Returns FastAPI's `responses` for these statuses, and always 403, of a dialect whose errors look like `model`."""
    return {status: {"model": model, "description": _ERRORS[status]} for status in sorted({403, *statuses})}


class DescribedAPI(FastAPI):
    """An application with a corrected description."""

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            document = super().openapi()
            _correct(document)
        assert self.openapi_schema is not None
        return self.openapi_schema


def _correct(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    for path in document["paths"].values():
        for operation in path.values():
            responses = operation["responses"]
            if _AUTOMATIC in str(responses.get("422")):
                del responses["422"]
            for parameter in operation.get("parameters", ()):
                _drop_null(parameter["schema"])
            for content_type, content in operation.get("requestBody", {}).get("content", {}).items():
                if content_type != "application/json":
                    for field in _resolve(content["schema"], schemas).get("properties", {}).values():
                        _drop_null(field)
            operation["security"] = [{}, *({name: []} for name in _SECURITY_SCHEMES)] if "401" in responses else []
    for name in (_AUTOMATIC, "ValidationError"):
        schemas.pop(name, None)
    document["components"]["securitySchemes"] = _SECURITY_SCHEMES


def _resolve(schema: dict[str, Any], schemas: dict[str, Any]) -> dict[str, Any]:
    return schemas[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema


def _drop_null(field: dict[str, Any]) -> None:
    """Parameters and form fields are text or absent, never null."""
    choices = [choice for choice in field.get("anyOf", ()) if choice != {"type": "null"}]
    if len(choices) == 1:
        del field["anyOf"]
        field.update(choices[0])
    elif choices:
        field["anyOf"] = choices
