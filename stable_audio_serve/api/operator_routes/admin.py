"""Routes for administrators, with the scope `admin`: keep models loaded, drain the server, handle dead letters."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query
from starlette.exceptions import HTTPException

from stable_audio_serve.api.description import error_responses
from stable_audio_serve.api.native.errors import render_error
from stable_audio_serve.api.native.schemas import ErrorBody, ValidationErrors
from stable_audio_serve.api.operator_routes import schemas
from stable_audio_serve.api.operator_routes.status import TAG, describe_drain
from stable_audio_serve.api.routing import operator_route_class, register_pattern
from stable_audio_serve.api.service import Service
from stable_audio_serve.core.catalog import ModelStatus
from stable_audio_serve.core.errors import ConflictError, UnknownModelError
from stable_audio_serve.core.operations import Operations
from stable_audio_serve.core.settings_sources import least_replicas
from stable_audio_serve.jobs.job import JobEvent
from stable_audio_serve.jobs.store.dead_letters import DeadLetter

PREFIX = "/v1/admin"

_RESPONSES = error_responses(ErrorBody, 401, 500, 503)
_LOAD_RESPONSES = _RESPONSES | error_responses(ErrorBody, own={404: "No such model."})
_UNLOAD_RESPONSES = _LOAD_RESPONSES | error_responses(
    ErrorBody, own={409: "The configuration keeps this model loaded."}
)
_LETTER_RESPONSES: dict[int | str, dict[str, Any]] = {
    422: {"model": ValidationErrors, "description": "A field is missing, of the wrong type or out of range."},
    **_RESPONSES,
}
_NUMBER_RESPONSES = _LETTER_RESPONSES | error_responses(ErrorBody, own={404: "No such dead letter."})
_LARGEST = 2**63 - 1

register_pattern("letter_number", "[0-9]{1,19}")  # more digits could not be converted to a number


def build_router(service: Service, operations: Operations) -> APIRouter:
    """Return the routes of one service."""
    router = APIRouter(
        prefix=PREFIX,
        route_class=operator_route_class(render_error, scopes=("admin",)),
        tags=[TAG],
        strict_content_type=False,
    )
    catalog = service.backend.catalog

    def resolve(name: str) -> str:
        try:
            return catalog.find(name).name
        except UnknownModelError as error:
            raise HTTPException(404, error.message) from error

    async def stage_of(name: str) -> str:
        return (await service.backend.status()).get(name, ModelStatus("loading")).stage

    @router.post("/models/{model:path}/load", status_code=202, responses=_LOAD_RESPONSES)
    async def load(model: str) -> schemas.KeptModel:
        """Keep one replica of a model loaded until it is unloaded or the server restarts."""
        name = resolve(model)
        await operations.keep(name)
        return schemas.KeptModel(model=name, kept=True, stage=await stage_of(name))

    @router.post("/models/{model:path}/unload", responses=_UNLOAD_RESPONSES)
    async def unload(model: str) -> schemas.KeptModel:
        """Let a model scale to zero after `downscale_delay_s` without work."""
        name = resolve(model)
        least = least_replicas(name, service.settings, catalog=catalog)
        if least:
            raise ConflictError(
                f"the configuration keeps {least} of this model: see preload_models and replicas.min_replicas",
                code="kept_by_configuration",
            )
        await operations.release(name)
        return schemas.KeptModel(model=name, kept=False, stage=await stage_of(name))

    @router.post("/drain", status_code=202, responses=_RESPONSES)
    async def drain() -> schemas.Drain:
        """Drain the server: /ready is 503, new work is refused with Retry-After, current work is finished, and waiting
        jobs are left to other servers. /v1/status shows when it is done."""
        await operations.drain()
        return describe_drain((await operations.report()).drain)

    @router.delete("/drain", responses=_RESPONSES)
    async def resume() -> schemas.Drain:
        """Accept new work again."""
        await operations.resume()
        return describe_drain((await operations.report()).drain)

    _add_dead_letters(router, service)
    return router


def _add_dead_letters(router: APIRouter, service: Service) -> None:
    """Add the routes for the dead letters of all clients: jobs whose attempts all failed because of the server."""
    jobs = service.jobs
    letters = jobs.store.dead_letters

    @router.get("/dead-letters", responses=_LETTER_RESPONSES)
    async def list_dead_letters(
        limit: Annotated[int, Query(ge=1, le=schemas.MOST_AT_ONCE, description="Maximum number per page.")] = 100,
        cursor: Annotated[int | None, Query(ge=0, le=_LARGEST, description="`next_cursor` of the page before.")] = None,
        *,
        model: Annotated[str | None, Query(max_length=64, description="Only those of this model.")] = None,
    ) -> schemas.DeadLetterPage:
        """List the dead letters of all clients, newest first."""
        page = await asyncio.to_thread(partial(letters.page, before=cursor, model=model, limit=limit + 1))
        last = page[limit - 1].number if len(page) > limit else None
        return schemas.DeadLetterPage(
            dead_letters=[schemas.DeadLetter(**_describe(letter)) for letter in page[:limit]], next_cursor=last
        )

    # Only digits match, so that /retry and /delete do not.
    @router.get("/dead-letters/{number:letter_number}", responses=_NUMBER_RESPONSES)
    async def show_dead_letter(number: Annotated[int, Path(ge=0, le=_LARGEST)]) -> schemas.DeadLetterDetails:
        """Return one dead letter and its events."""
        found = await asyncio.to_thread(letters.find, number)
        if found is None:
            raise HTTPException(404, f"no dead letter has the number {number}")
        letter, events = found
        return schemas.DeadLetterDetails(**_describe(letter), events=[_describe_event(event) for event in events])

    @router.post("/dead-letters/retry", responses=_LETTER_RESPONSES)
    async def retry_dead_letters(body: schemas.LetterNumbers) -> schemas.LettersDone:
        """Queue dead letters again, with their attempts reset to 0."""
        done = await jobs.write(partial(letters.retry, set(body.numbers)))
        jobs.wake()
        return _sort(body, done)

    @router.post("/dead-letters/delete", responses=_LETTER_RESPONSES)
    async def delete_dead_letters(body: schemas.LetterNumbers) -> schemas.LettersDone:
        """Delete dead letters and their source files."""
        return _sort(body, await jobs.forget_dead_letters(set(body.numbers)))


def _sort(body: schemas.LetterNumbers, done: Sequence[int]) -> schemas.LettersDone:
    return schemas.LettersDone(done=list(done), not_found=sorted(set(body.numbers) - set(done)))


def _describe(letter: DeadLetter) -> dict[str, Any]:
    job, error = letter.job, letter.job.error
    spec, request = job.spec, job.spec.request
    return {
        "number": letter.number,
        "id": spec.id,
        "contract": spec.contract,
        "client": spec.client,
        "model": spec.model,
        "priority": request.priority,
        "prompt": request.prompt,
        "duration_s": request.duration_s,
        "batch_size": request.batch_size,
        "created_at": job.created_at.isoformat(),
        "failed_at": job.completed_at.isoformat() if job.completed_at else None,
        "attempts": job.attempts,
        "error": {"code": error.code, "message": error.message} if error else None,
    }


def _describe_event(event: JobEvent) -> schemas.LetterEvent:
    return schemas.LetterEvent(
        at=event.at.isoformat(), stage=event.stage, fraction=event.fraction, message=event.message
    )
