"""ASGI middleware around every request: request id, one log line, metrics, and handling of unexpected exceptions.

It never logs prompts or bodies. An unexpected exception is logged, and the client gets a 500 without details.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from typing import Any

import structlog
from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stable_audio_serve.api.middleware.limits import ClientGoneError, connection_of
from stable_audio_serve.core.errors import GenerationError, StoppingError, StorageError
from stable_audio_serve.core.metrics import Level, Metrics

log = structlog.get_logger("stable_audio_serve.api")

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")
_CLIENT_GONE_STATUS = 499  # as in nginx; used in logs and metrics only
_POLLED = ("/health", "/ready", "/v1/status")  # requested every few seconds by probes and web pages


class ObserveMiddleware:
    """Logs and counts every request. Keeps the client's `X-Request-Id`, or creates one.

    Handlers add values to the log line with `note`.
    """

    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics
        self._in_progress = Level(metrics, "http_requests_in_progress")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: PLR0917 - ASGI's signature
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        state["request_id"] = request_id = _request_id(scope)
        state["log"] = {}
        started_at = time.monotonic()
        status = 0
        self._in_progress.change(1)

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id):
            try:
                await self._app(scope, receive, send_with_id)
            except ClientGoneError:
                status = _CLIENT_GONE_STATUS
            except asyncio.CancelledError:
                status = status if connection_of(scope).is_answered else _CLIENT_GONE_STATUS
                raise
            except Exception as error:
                # A stored file could not be read to its end, or the process stops during a stream of audio. The client
                # notices that the response is too short.
                if status and isinstance(error, StorageError | StoppingError):
                    note(scope, error=error.message)
                    return
                log.exception("request failed")
                if not status:
                    await _opaque_answer(scope)(scope, receive, send_with_id)
            finally:
                self._account(scope, status, duration_ms=(time.monotonic() - started_at) * 1000)

    def _account(self, scope: Scope, status: int, *, duration_ms: float) -> None:
        self._in_progress.change(-1)
        route = getattr(scope.get("route"), "path", "unmatched")
        facts = scope["state"]["log"]
        self._metrics.increment("http_requests", route=route, method=scope["method"], status=str(status))
        self._metrics.observe("http_request_ms", duration_ms, route=route)
        if "refusal" in facts:
            self._metrics.increment("refusals", reason=facts["refusal"])
        log.log(
            _log_level(route, status),
            "request",
            method=scope["method"],
            route=route,
            status=status,
            duration_ms=round(duration_ms, 1),
            **facts,
        )


def note(scope: Scope, **values: Any) -> None:
    """Add `values` to the request's log line."""
    scope["state"]["log"].update(values)


def _log_level(route: str, status: int) -> int:
    if status == 500:
        return logging.ERROR
    return logging.DEBUG if route.endswith(_POLLED) and status < 500 else logging.INFO  # routes may have a prefix


def _request_id(scope: Scope) -> str:
    given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
    return given.decode() if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def _opaque_answer(scope: Scope) -> Response:
    """Return a 500 response without details, in the format of the route's dialect if a route matched."""
    render = scope["state"].get("render_error")
    if render is not None:
        return render(Request(scope), GenerationError("unexpected"))
    return JSONResponse({"detail": f"internal error; request id {scope['state']['request_id']}"}, 500)
