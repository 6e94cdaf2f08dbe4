"""What every dialect's routes share: bounded body parsing, and each dialect's own way to say what went wrong."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Coroutine
from typing import Any

import pydantic_core
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.datastructures import FormData
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from stable_audio_serve.core.errors import StableAudioError

ExpectedError = StableAudioError | RequestValidationError | HTTPException
ErrorRenderer = Callable[[Request, ExpectedError], Response]

_MAX_FILES = 8
_MAX_FIELDS = 64
_MAX_FIELD_BYTES = 512 * 1024  # the longest prompt has 100,000 characters of up to four bytes


class BoundedRequest(Request):
    """A request whose body cannot exhaust us: depth and number sizes of JSON, parts and fields of forms."""

    async def json(self) -> Any:
        """The JSON body. Raises JSONDecodeError, also for nesting and numbers beyond all reason."""
        body = await self.body()
        try:
            return pydantic_core.from_json(body.removeprefix(codecs.BOM_UTF8))
        except ValueError as error:
            raise json.JSONDecodeError(str(error), "", 0) from error

    async def _get_form(self, **_: Any) -> FormData:
        try:
            return await super()._get_form(max_files=_MAX_FILES, max_fields=_MAX_FIELDS, max_part_size=_MAX_FIELD_BYTES)
        except HTTPException as error:
            if error.status_code != 400:
                raise
            raise HTTPException(400, f"body: {error.detail}") from error


def route_class(render: ErrorRenderer) -> type[APIRoute]:
    """A route type that answers the errors we expect in one dialect's form; all others stay unexpected."""

    class DialectRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()

            async def handle_and_render(request: Request) -> Response:
                try:
                    return await handle(BoundedRequest(request.scope, request.receive))
                except (StableAudioError, RequestValidationError, HTTPException) as error:
                    return render(request, error)

            return handle_and_render

    return DialectRoute
