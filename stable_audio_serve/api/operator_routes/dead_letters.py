"""Routes for the dead letters of all clients: jobs whose attempts all failed because of the server."""

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
from stable_audio_serve.api.routing import operator_route_class, register_pattern
from stable_audio_serve.api.service import Service
from stable_audio_serve.jobs.job import JobEvent
from stable_audio_serve.jobs.store.dead_letters import DeadLetter

_LARGEST = 2**63 - 1
_INVALID: dict[int | str, dict[str, Any]] = {
    422: {"model": ValidationErrors, "description": "A field is missing, of the wrong type or out of range."},
    **error_responses(ErrorBody, 401, 500, 503),
}
_UNKNOWN = _INVALID | error_responses(ErrorBody, own={404: "No such dead letter."})


register_pattern("letter_number", "[0-9]{1,19}")  # more digits could not be converted to a number


def build_router(service: Service) -> APIRouter:
    """Return the routes."""
    router = APIRouter(
        prefix="/dead-letters",
        route_class=operator_route_class(render_error, scopes=("admin",)),
        strict_content_type=False,
    )
    jobs = service.jobs
    letters = jobs.store.dead_letters

    @router.get("", responses=_INVALID)
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

    @router.get("/{number:letter_number}", responses=_UNKNOWN)  # only digits match, so that /retry and /delete do not
    async def show_dead_letter(number: Annotated[int, Path(ge=0, le=_LARGEST)]) -> schemas.DeadLetterDetails:
        """Return one dead letter and its events."""
        found = await asyncio.to_thread(letters.find, number)
        if found is None:
            raise HTTPException(404, f"no dead letter has the number {number}")
        letter, events = found
        return schemas.DeadLetterDetails(**_describe(letter), events=[_describe_event(event) for event in events])

    @router.post("/retry", responses=_INVALID)
    async def retry_dead_letters(body: schemas.LetterNumbers) -> schemas.LettersDone:
        """Queue dead letters again, with their attempts reset to 0."""
        done = await jobs.write(partial(letters.retry, set(body.numbers)))
        jobs.wake()
        return _sort(body, done)

    @router.post("/delete", responses=_INVALID)
    async def delete_dead_letters(body: schemas.LetterNumbers) -> schemas.LettersDone:
        """Delete dead letters and their source files."""
        return _sort(body, await jobs.forget_dead_letters(set(body.numbers)))

    return router


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
