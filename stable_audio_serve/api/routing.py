"""What every dialect's routes share: bounded body parsing, and each dialect's own way to say what went wrong."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Coroutine
from typing import Any

import pydantic_core
from fastapi.routing import APIRoute
from starlette.convertors import StringConvertor, register_url_convertor
from starlette.datastructures import FormData
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match

from stable_audio_serve.api.middleware.api_keys import ApiKeys
from stable_audio_serve.api.middleware.draining import Draining
from stable_audio_serve.api.middleware.limits import accept_form
from stable_audio_serve.api.middleware.origins import Origins
from stable_audio_serve.api.refusals import EXPECTED_ERRORS, ExpectedError
from stable_audio_serve.core.errors import UnauthorizedError

ErrorRenderer = Callable[[Request, ExpectedError], Response]

_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")
_MAX_FILES = 8
_MAX_FIELDS = 64
_MAX_FIELD_BYTES = 512 * 1024  # the longest prompt has 100,000 characters of up to four bytes


class HexIdConvertor(StringConvertor):
    """In routes, `{name:hex_id}`: an id as we make them, so that it is told apart from words at its place."""

    regex = "[0-9a-f]{32}"


class JobIdConvertor(StringConvertor):
    """In routes, `{name:job_id}`: what may be meant as a job's id, so that what is none can be refused as one."""

    regex = "(?!(?:variations|inpaint)$)[^/]+"


register_url_convertor("hex_id", HexIdConvertor())
register_url_convertor("job_id", JobIdConvertor())


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
        if self.headers.get("content-type", "").lower().startswith("multipart/"):
            accept_form(self.scope)
        try:
            return await super()._get_form(max_files=_MAX_FILES, max_fields=_MAX_FIELDS, max_part_size=_MAX_FIELD_BYTES)
        except HTTPException as error:
            if error.status_code != 400:
                raise
            raise HTTPException(400, f"body: {error.detail}") from error


def route_class(render: ErrorRenderer) -> type[APIRoute]:
    """A route type that answers the errors we expect in one dialect's form; all others stay unexpected.

    Where keys are configured it admits only requests that bring one. `request.state.client` says whose they are.
    """
    return _dialect_route(render, _admit_by_key)


def public_route_class(render: ErrorRenderer) -> type[APIRoute]:
    """The same without keys: for links that are handed out. Whoever brings no valid key is the client None."""
    return _dialect_route(render, _admit_everybody)


def probe_route_class(render: ErrorRenderer) -> type[APIRoute]:
    """The same for probes, who need no key and are answered as long as there is anybody to answer."""
    return _dialect_route(render, _admit_always)


def allowed_methods(request: Request) -> list[str]:
    """What the path of `request` can be asked with, over all routes that share it."""
    scopes = {method: {**request.scope, "method": method} for method in _METHODS}
    routes = request.app.routes
    return [name for name, scope in scopes.items() if any(route.matches(scope)[0] is Match.FULL for route in routes)]


def _dialect_route(render: ErrorRenderer, admit: Callable[[Request], None]) -> type[APIRoute]:
    class DialectRoute(APIRoute):
        render_error = staticmethod(render)

        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()

            async def handle_and_render(request: Request) -> Response:
                request.state.render_error = render  # for what nobody expects, see `observe`
                bounded = BoundedRequest(request.scope, request.receive)
                try:
                    admit(request)
                    return await handle(bounded)
                except EXPECTED_ERRORS as error:
                    response = render(request, error)
                    if isinstance(error, UnauthorizedError):
                        response.headers["WWW-Authenticate"] = "Bearer"
                    return response
                finally:
                    await bounded.close()  # deletes what was uploaded, whoever parsed the form

            return handle_and_render

    return DialectRoute


def _admit_by_key(request: Request) -> None:
    _admit_visitor(request)
    keys: ApiKeys = request.app.state.keys
    request.state.client = keys.admit(request)


def _admit_everybody(request: Request) -> None:
    _admit_visitor(request)
    keys: ApiKeys = request.app.state.keys
    request.state.client = keys.find(request)


def _admit_always(_: Request) -> None:
    pass


def _admit_visitor(request: Request) -> None:
    """Whatever a request wants but to know whether there is anybody."""
    origins: Origins = request.app.state.origins
    origins.admit(request)
    draining: Draining = request.app.state.draining
    draining.refuse_new()
