"""FastAPI route classes. They limit body parsing, check requests, and render errors in the dialect's format."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import aclosing
from typing import Any
from urllib.parse import unquote

import pydantic_core
from fastapi.routing import APIRoute
from python_multipart.multipart import parse_options_header
from starlette.convertors import StringConvertor, register_url_convertor
from starlette.datastructures import FormData
from starlette.exceptions import HTTPException
from starlette.formparsers import FormParser, MultiPartException, MultiPartParser
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match

from stable_audio_serve.api.json_values import MAX_MARKS, has_more_marks
from stable_audio_serve.api.middleware.api_keys import ApiKeys
from stable_audio_serve.api.middleware.callers import find_caller
from stable_audio_serve.api.middleware.draining import Draining
from stable_audio_serve.api.middleware.key_limits import KeyLimiter
from stable_audio_serve.api.middleware.limits import MAX_FIELDS_BYTES, ClientGoneError, connection_of
from stable_audio_serve.api.middleware.origins import Origins
from stable_audio_serve.api.refusals import EXPECTED_ERRORS, ExpectedError
from stable_audio_serve.core.errors import UnauthorizedError
from stable_audio_serve.core.ids import current_client
from stable_audio_serve.core.keys import ANYBODY, Scope

ErrorRenderer = Callable[[Request, ExpectedError], Response]
# The scopes of a route. An API key needs one of them. If there are none, any API key is accepted.
Scopes = tuple[Scope, ...] | Callable[[Request], tuple[Scope, ...]]

_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")
_GENERATING_SCOPES = frozenset({"generate", "jobs"})
_MAX_FILES = 8
_MAX_FIELDS = 64
_MAX_BOUNDARIES = 1000  # of a form, also in the data of its parts
_MAX_BLANKS = 1000  # spaces and tabs after a boundary
_MAX_URLENCODED = {b"&": 1000, b"%": 20_000}  # how often an urlencoded form may contain these characters
_MAX_FIELD_BYTES = 512 * 1024  # the longest prompt has 100,000 characters of up to four bytes
_COMPRESSIONS = frozenset({"gzip", "x-gzip", "deflate", "compress", "x-compress", "br", "zstd"})


def register_pattern(name: str, regex: str) -> None:
    """Let `{parameter:name}` in routes match a regular expression."""
    register_url_convertor(name, type(name, (StringConvertor,), {"regex": regex})())


register_pattern("hex_id", "[0-9a-f]{32}")  # an id in the server's format
# Any text except the names of routes. Invalid job ids match too, so that the response can explain what is wrong.
register_pattern("job_id", "(?!(?:variations|inpaint)$)[^/]+")


class BoundedRequest(Request):
    """A request with limits on its body.

    For JSON: the nesting depth, the size of numbers, and the number of values. For a form: the number and the size of
    its parts.
    """

    async def json(self) -> Any:
        """Return the JSON body.

        Raises JSONDecodeError if it is invalid, is nested too deeply or contains too large a number. Raises
        HTTPException 413 if it contains too many values, or is large for another reason than a file.
        """
        body = await self.body()
        is_large = len(body) > MAX_FIELDS_BYTES
        if is_large and has_more_marks(body, counts_strings=True):  # parsing millions of values would take seconds
            raise HTTPException(413, f"body: larger than {MAX_FIELDS_BYTES} bytes, and not because of a file")
        try:
            parsed = pydantic_core.from_json(body.removeprefix(codecs.BOM_UTF8))
        except ValueError as error:
            raise json.JSONDecodeError(str(error), "", 0) from error
        if not is_large and has_more_marks(body):
            raise HTTPException(413, f"body: more than {MAX_MARKS} lists, objects and commas")
        return parsed

    async def _get_form(self, **_: Any) -> FormData:
        limits: dict[str, int] = {"max_files": _MAX_FILES, "max_fields": _MAX_FIELDS, "max_part_size": _MAX_FIELD_BYTES}
        try:
            if _has_form(self):
                connection_of(self.scope).accept_form()
            content_type, options = parse_options_header(self.headers.get("content-type"))
            if self._form is None and content_type == b"multipart/form-data":
                async with aclosing(self._multipart_stream(options.get(b"boundary", b""))) as stream:
                    self._form = await _WholeFormParser(self.headers, stream, **limits).parse()
            elif self._form is None and content_type == b"application/x-www-form-urlencoded":
                async with aclosing(self._urlencoded_stream()) as stream:
                    parser = FormParser(self.headers, stream, max_fields=_MAX_FIELDS, max_part_size=_MAX_FIELD_BYTES)
                    self._form = await parser.parse()
            return await super()._get_form(**limits)
        except MultiPartException as error:
            raise HTTPException(400, f"body: {error.message}") from error
        except ClientGoneError:
            raise
        except OSError as error:
            raise HTTPException(507, "there is no room for temporary files") from error

    async def _multipart_stream(self, boundary: bytes) -> AsyncGenerator[bytes, None]:
        """Yield the parts of a multipart body. Raises MultiPartException if it has too many boundaries or blanks.

        The parser takes 5 us for each boundary that does not end a part, and 0.5 us for each blank after a boundary, so
        it would block the event loop for seconds.
        """
        boundary = b"\r\n--" + boundary
        padded = re.compile(re.escape(boundary) + rb"[ \t]{%d}" % (_MAX_BLANKS + 1))
        num_boundaries, before = 0, b""
        async with aclosing(self.stream()) as stream:
            async for chunk in stream:
                num_boundaries += chunk.count(boundary)
                if num_boundaries > _MAX_BOUNDARIES:
                    raise MultiPartException(f"the form contains its boundary more than {_MAX_BOUNDARIES} times")
                before = before[-len(boundary) - _MAX_BLANKS :] + chunk
                if padded.search(before):
                    raise MultiPartException(f"more than {_MAX_BLANKS} spaces follow a boundary of the form")
                yield chunk

    async def _urlencoded_stream(self) -> AsyncGenerator[bytes, None]:
        """Yield the parts of an urlencoded body. Raises MultiPartException if it has too many & or %.

        The parser takes 0.3 us for each & after another, and 0.5 us for each %.
        """
        found = dict.fromkeys(_MAX_URLENCODED, 0)
        async with aclosing(self.stream()) as stream:
            async for chunk in stream:
                for character, most in _MAX_URLENCODED.items():
                    found[character] += chunk.count(character)
                    if found[character] > most:
                        limit = f"the character {character.decode()} more than {most} times"
                        raise MultiPartException(f"the form contains {limit}; send it as multipart/form-data")
                yield chunk


class _WholeFormParser(MultiPartParser):
    """Refuses a form whose closing boundary is missing. Starlette would accept it without its last field. Names the
    field that is too large. Accepts a file that has its name only as `filename*` (RFC 5987).
    """

    _is_cut_off = False

    def on_part_begin(self) -> None:
        self._is_cut_off = True
        super().on_part_begin()

    def on_headers_finished(self) -> None:
        part = self._current_part
        disposition = part.content_disposition or b""
        # Starlette's parser ignores `filename*`, so the part would be a text field.
        is_extended = b"filename*=" in disposition and b"filename" not in parse_options_header(disposition)[1]
        if is_extended:
            part.content_disposition = disposition.replace(b"filename*=", b"filename=")
        super().on_headers_finished()
        if is_extended and part.file:
            part.file.filename = unquote((part.file.filename or "").rpartition("'")[2])  # UTF-8'language'name

    def on_part_data(self, data: bytes, *span: int) -> None:
        try:
            super().on_part_data(data, *span)
        except MultiPartException as error:
            name = self._current_part.field_name[:100]
            raise MultiPartException(f"{name}: a field must not exceed {self.max_part_size} bytes") from error

    def on_end(self) -> None:
        self._is_cut_off = False

    async def parse(self) -> FormData:
        form = await super().parse()
        if self._is_cut_off:
            await form.close()
            raise MultiPartException("the form is incomplete: its closing boundary is missing")
        return form


def route_class(
    render: ErrorRenderer,
    *,
    scopes: Scopes,
    enter: Callable[[Request], None] | None = None,
    takes_bare_key: bool = False,
    takes_files_in_json: Callable[[Request], bool] | None = None,
) -> type[APIRoute]:
    """Return a route class that checks requests and renders expected errors in one dialect's format.

    If keys are configured, a request needs a key with one of `scopes`. The key is checked before the body is read. If
    the request uploads a file, the limits of its key are checked before the body is read too. `enter` is called before
    these checks. With `takes_bare_key`, the header `Authorization` may have the key alone. If `takes_files_in_json`
    returns true, the JSON body may have a file as a data URI. The class sets `request.state.caller`,
    `current_client`, and `request.state.client` to the key's client.
    """

    async def admit(request: Request) -> None:
        (enter or _admit_client)(request)
        keys: ApiKeys = request.app.state.keys
        await keys.ring.refresh()
        needed = scopes(request) if callable(scopes) else scopes
        key = keys.admit(request, needed, takes_bare_key=takes_bare_key)
        request.state.caller = find_caller(request, key, address_header=request.app.state.address_header)
        current_client.set(request.state.caller.name)
        request.state.client = key.client
        if takes_files_in_json and takes_files_in_json(request):
            connection_of(request.scope).accept_file_in_json()
        if request.method == "POST" and _GENERATING_SCOPES.intersection(needed) and _has_form(request):
            limiter: KeyLimiter = request.app.state.limiter
            await limiter.require_room(key, takes_place="generate" in needed)

    return _dialect_route(render, admit)


def _has_form(request: Request) -> bool:
    return request.headers.get("content-type", "").lower().startswith("multipart/")


def operator_route_class(render: ErrorRenderer, *, scopes: Scopes) -> type[APIRoute]:
    """Return a route class for operators. Its routes respond even while the server drains or stops."""
    return route_class(render, scopes=scopes, enter=_admit_operator)


def public_route_class(render: ErrorRenderer, *, scopes: tuple[Scope, ...] = ()) -> type[APIRoute]:
    """Return a route class for links that need no key.

    If the request has a valid key with one of `scopes`, `request.state.client` is the key's client, otherwise None. The
    class also sets `request.state.caller` and `current_client`.
    """

    async def admit(request: Request) -> None:
        _admit_client(request)
        keys: ApiKeys = request.app.state.keys
        await keys.ring.refresh()
        key = keys.find(request)
        key = key if key and (key.may(scopes) or not scopes) else None
        request.state.client = key.client if key else None
        request.state.caller = find_caller(request, key or ANYBODY, address_header=request.app.state.address_header)
        current_client.set(request.state.caller.name)

    return _dialect_route(render, admit)


def probe_route_class(render: ErrorRenderer) -> type[APIRoute]:
    """Return a route class for health probes. Its routes need no key, and respond even while the server stops."""
    return _dialect_route(render, _admit_always)


def allowed_methods(request: Request) -> list[str]:
    """Return the HTTP methods that any route supports for the path of the request."""
    scopes = {method: {**request.scope, "method": method} for method in _METHODS}
    routes = request.app.routes
    return [name for name, scope in scopes.items() if any(route.matches(scope)[0] is Match.FULL for route in routes)]


def _dialect_route(render: ErrorRenderer, admit: Callable[[Request], Awaitable[None]]) -> type[APIRoute]:
    class DialectRoute(APIRoute):
        render_error = staticmethod(render)

        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()

            async def handle_and_render(request: Request) -> Response:
                request.state.render_error = render  # for unexpected exceptions, see `middleware.observe`
                bounded = BoundedRequest(request.scope, request.receive)
                try:
                    await admit(request)
                    _refuse_compressed_body(request)
                    return await handle(bounded)
                except EXPECTED_ERRORS as error:
                    response = render(request, error)
                    if isinstance(error, UnauthorizedError):
                        response.headers["WWW-Authenticate"] = "Bearer"
                    return response
                finally:
                    await bounded.close()  # deletes uploaded temporary files

            return handle_and_render

    return DialectRoute


def _refuse_compressed_body(request: Request) -> None:
    """Raise HTTPException with status 415 (RFC 9110, 15.5.16) if the body is compressed: it would not be decoded."""
    encodings = request.headers.get("content-encoding", "").lower().replace(" ", "").split(",")
    if used := sorted(_COMPRESSIONS.intersection(encodings)):
        message = f"Content-Encoding: the body must not be compressed (got {', '.join(used)}); allowed: identity"
        raise HTTPException(415, message, {"Accept-Encoding": "identity"})


async def _admit_always(_: Request) -> None:
    pass


def _admit_client(request: Request) -> None:
    """Raise an error if a client's request has a foreign origin, or if the server drains or stops."""
    _admit_origin(request)
    draining: Draining = request.app.state.draining
    draining.admit(request.scope)


def _admit_operator(request: Request) -> None:
    """Raise an error if an operator's request has a foreign origin.

    The request does not count as in flight, so draining the server does not wait for it.
    """
    _admit_origin(request)
    draining: Draining = request.app.state.draining
    draining.end(request.scope.get("in_flight_token"))


def _admit_origin(request: Request) -> None:
    origins: Origins = request.app.state.origins
    origins.admit(request)
