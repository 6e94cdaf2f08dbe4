"""Correct the OpenAPI description that FastAPI generates from the routes.

FastAPI's description is wrong in three ways: every operation with a parameter has FastAPI's own 422 response, optional
parameters and form fields are nullable, and API keys are missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from stable_audio_serve.core.sound import AudioFormat

_AUTOMATIC = "HTTPValidationError"
_INVALID = "A field is missing, of the wrong type or out of range."
_ERRORS = {
    400: _INVALID,
    401: "Keys are configured, and the request has no valid one.",
    403: "The key lacks a scope, or the request's origin or host is not allowed.",
    408: "The body did not arrive in time.",
    413: "The upload or the body is too large.",
    416: "The file ends before the part that the header Range names.",
    422: _INVALID,
    429: "This caller has reached a limit; Retry-After is the time to wait.",
    500: "Internal error.",
    503: "No capacity now, or the model is not ready; Retry-After is the time to wait.",
    504: "The time budget ran out.",
    507: "No storage space is left.",
}
_SECURITY_SCHEMES = {
    # Only one scheme: Swagger UI shows an input field for each scheme, and users would fill in the wrong field.
    "Bearer": {
        "type": "http",
        "scheme": "bearer",
        "description": "An API key, if keys are configured. `Authorization: Key <key>` and `xi-api-key` work too.",
    },
}


def error_responses(
    model: type[BaseModel], *statuses: int, own: Mapping[int, str] = MappingProxyType({})
) -> dict[int | str, dict[str, Any]]:
    """Return the `responses` of a FastAPI route for error `statuses` and for 403, which all routes can return.

    `model` is the Pydantic model of the dialect's error responses. `own` maps more statuses to their descriptions.
    """
    described = {status: _ERRORS[status] for status in {403, *statuses}} | dict(own)
    return {status: {"model": model, "description": text} for status, text in sorted(described.items())}


class DescribedAPI(FastAPI):
    """An application with a corrected OpenAPI description."""

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
    # Fields of the type `fields.ResponseFormat` list the formats themselves, so the schema of AudioFormat is unused.
    for name in (_AUTOMATIC, "ValidationError", AudioFormat.__name__):
        schemas.pop(name, None)
    document["components"]["securitySchemes"] = _SECURITY_SCHEMES


def _resolve(schema: dict[str, Any], schemas: dict[str, Any]) -> dict[str, Any]:
    return schemas[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema


def _drop_null(field: dict[str, Any]) -> None:
    """Remove null from the types of a parameter or form field. Clients can omit the field, but cannot send null."""
    choices = [choice for choice in field.get("anyOf", ()) if choice != {"type": "null"}]
    if len(choices) == 1:
        del field["anyOf"]
        field.update(choices[0])
    elif choices:
        field["anyOf"] = choices
