"""Recreate clips from recipes. A recipe has all values that determine an audio file's bytes.

Clients send a recipe, or an audio file in which a recipe is embedded. They also send the source audio that the recipe
names. A replay runs like any other request. The recipe is untrusted input.
"""

from __future__ import annotations

import codecs
import math
import uuid
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import pydantic_core
from fastapi import APIRouter, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.responses import JSONResponse, Response

from stable_audio_serve.api.answers import RECIPE_HEADER, REPLAY
from stable_audio_serve.api.json_values import has_more_marks
from stable_audio_serve.api.links import base_url
from stable_audio_serve.api.middleware.observe import note
from stable_audio_serve.api.native.errors import render_error
from stable_audio_serve.api.native.ignored import check_names
from stable_audio_serve.api.native.routes import AUDIO_RESPONSES, TAG, audio_answer, file_stem
from stable_audio_serve.api.native.schemas import ConflictBody
from stable_audio_serve.api.native.status import REPLAY_OF, JobTicket, hash_recipe, job_url
from stable_audio_serve.api.native.submission import CONTRACT, REPLAYED, TICKET_HEADERS, IdempotencyKey
from stable_audio_serve.api.refusals import invalid
from stable_audio_serve.api.routing import route_class
from stable_audio_serve.api.service import Service
from stable_audio_serve.audio.finish import ClipOrigin, FileOrder, FinishedFile, finish, finish_window
from stable_audio_serve.audio.formats import check_encoding
from stable_audio_serve.audio.recipe import MOST_BYTES, MOST_REGIONS, MOST_SECTIONS, Recipe, is_exact
from stable_audio_serve.audio.workers import hash_file
from stable_audio_serve.core.catalog import ModelCard
from stable_audio_serve.core.errors import InvalidRequestError, InvalidUploadError
from stable_audio_serve.core.generation import GenerationResult, Section, SourceAudio
from stable_audio_serve.core.ids import JobId
from stable_audio_serve.jobs.job import JobSpec
from stable_audio_serve.jobs.pieces.sections import find_faults, total_duration_s

_PATH = "/v1/audio/replay"
_MULTIPART = "multipart/form-data"
_MOST_STEPS = 1000  # the highest limit of `steps` in any dialect
_MOST_REPEATED_CHARS = 200
_MOST_FAULTS = 1000
_MOST_MARKS = 30 * MOST_SECTIONS  # lists, objects and commas; a section has up to 22

_REPLAY_HEADER: dict[str, Any] = {
    REPLAY: {
        "schema": {"type": "string", "enum": ["exact", "close"]},
        "description": "exact = same bytes as the original; close = another device or version, bytes may differ.",
    }
}
_RESPONSES: dict[int | str, dict[str, Any]] = {
    **AUDIO_RESPONSES,
    202: {
        "model": JobTicket,
        "description": "The recipe of a long piece: the job that recreates it.",
        "headers": TICKET_HEADERS,
    },
    409: {"model": ConflictBody, "description": "The key was used for a different request."},
    200: AUDIO_RESPONSES[200]
    | {"description": "The audio file.", "headers": AUDIO_RESPONSES[200]["headers"] | RECIPE_HEADER | _REPLAY_HEADER},
}
_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": {"$ref": "#/components/schemas/Recipe"}},
            _MULTIPART: {
                "schema": {
                    "type": "object",
                    "properties": {
                        "recipe": {"type": "string", "description": "A recipe as JSON, unless `file` contains one."},
                        "file": {
                            "type": "string",
                            "format": "binary",
                            "description": "An audio file that contains a recipe.",
                        },
                        "audio": {
                            "type": "array",
                            "items": {"type": "string", "format": "binary"},
                            "description": "Source files; the recipe names them by SHA-256.",
                        },
                    },
                }
            },
        },
    }
}


def build_router(service: Service) -> APIRouter:
    """Return the replay route."""
    router = APIRouter(route_class=route_class(render_error, scopes=("generate",)), tags=[TAG])

    @router.post(_PATH, response_class=Response, responses=_RESPONSES, openapi_extra=_BODY)
    async def replay(request: Request, idempotency_key: IdempotencyKey = None) -> Response:
        """Recreate a clip from its recipe. The bytes are the same if the response header `X-Replay` is `exact`.

        The recipe of a long piece is replayed by a job: the answer is 202 with the job's ticket, and when the job has
        succeeded, `replay` in its status is `exact` or `close`.
        """
        started_at = service.clock.monotonic()
        text, uploads, unknown = await _read(service, request)
        check_names(request, unknown, limits=service.settings.api)
        recipe = _parse(text)
        try:
            return await _replay(
                service, request, recipe=recipe, uploads=uploads, started_at=started_at, key=idempotency_key
            )
        except InvalidRequestError as error:  # each field of a recipe is a field of the request
            raise invalid(error.field or "recipe", error.message) from error

    return router


async def _replay(
    service: Service,
    request: Request,
    *,
    recipe: Recipe,
    uploads: list[UploadFile],
    started_at: float,
    key: str | None,
) -> Response:
    """Recreate a clip, or add a job for a long piece. Raises InvalidRequestError with a field of the recipe."""
    card = _require_model(service, recipe)
    sources = await _find_sources(service, recipe, card=card, uploads=uploads)
    if recipe.sections:
        service.keys.admit(request, ("jobs",))  # the ticket is of no use to a key without this scope
        return await _replay_by_job(service, request, recipe=recipe, card=card, key=key)
    generation = recipe.to_request(sources=sources, request_id=request.state.request_id)
    note(request.scope, model=card.name, duration_s=generation.duration_s, batch_size=1)
    result = await service.generate(card, generation, caller=request.state.caller, started_at=started_at)
    output = await service.finish_by(result, lambda: _finish(result, recipe, origin=ClipOrigin.of(generation)))
    note(request.scope, num_bytes=output.file.num_bytes)
    response = audio_answer(request, output, file_format=recipe.response_format)
    response.headers[REPLAY] = "exact" if is_exact(recipe, result.made_on) else "close"
    return response


async def _replay_by_job(
    service: Service, request: Request, *, recipe: Recipe, card: ModelCard, key: str | None
) -> Response:
    """Add a job that makes a long piece again, or find the job that has this key. Returns the job's ticket.

    Raises the errors of `Service.add_job`.
    """
    job_id, recipe_hash = JobId(uuid.uuid4().hex), hash_recipe(recipe)
    base = base_url(request, service.settings.api)
    sections = tuple(Section(one.duration, one.prompt) for one in recipe.sections or ())
    generation = recipe.to_request(sources={}, request_id=request.state.request_id)
    spec = JobSpec(
        id=job_id,
        contract=CONTRACT,
        model=card.name,
        mode="long-piece",
        request=replace(generation, duration_s=total_duration_s(sections)),
        encoding=recipe.encoding,
        file_stem=file_stem(card.name),
        peaks="clip" if recipe.peaks == "clip" else "limit",
        finishing=recipe.finishing,
        with_recipe=True,
        file_prefix=f"{job_id}-",
        sections=sections,
        overlap_s=recipe.overlap or 0.0,
        client=request.state.client,
        idempotency_key=key,
        fingerprint=recipe_hash,
        wire={"base_url": base, REPLAY_OF: recipe_hash},
    )
    added = await service.add_job(spec, card=card, caller=request.state.caller)
    job_id = added.job.spec.id
    note(request.scope, job_id=job_id, model=card.name, duration_s=spec.request.duration_s)
    headers = {} if added.is_new else {REPLAYED: "true"}
    return JSONResponse(JobTicket(id=job_id, status_url=job_url(base, job_id)).model_dump(), 202, headers)


def _finish(result: GenerationResult, recipe: Recipe, *, origin: ClipOrigin | None) -> FinishedFile:
    """Encode the file that a recipe describes. Call this from a worker thread."""
    if recipe.peaks == "full":
        return finish_window(result, num_samples=recipe.samples, origin=origin)
    order = FileOrder(recipe.peaks, encoding=recipe.encoding, origin=origin, finishing=recipe.finishing)
    return finish(result, order)


async def _read(service: Service, request: Request) -> tuple[str | bytes, list[UploadFile], list[str]]:
    """Return the recipe in a request body as text, the uploaded files, and the names of unknown form fields.

    Raises RequestValidationError, HTTPException, errors of `core.errors`.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != _MULTIPART:
        return await request.body(), [], []
    form = await request.form()
    uploads = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
    given = [(name, value) for name, value in form.multi_items() if name in {"recipe", "file"}]
    if len(given) != 1:
        raise invalid(
            "recipe", "recipe: send either the part recipe, or the part file with an audio file that contains a recipe"
        )
    (name, value) = given[0]
    unknown = [other for other, sent in form.multi_items() if other != name and not isinstance(sent, UploadFile)]
    if name == "file":
        return await _extract(service, value), uploads, unknown
    return await value.read(MOST_BYTES + 1) if isinstance(value, UploadFile) else value, uploads, unknown


async def _extract(service: Service, file: UploadFile | str) -> str:
    """Return the recipe in an uploaded audio file as text.

    Raises RequestValidationError, InvalidUploadError, UploadTooLargeError, all for the field `file`.
    """
    if isinstance(file, str):
        raise InvalidUploadError("file: the uploaded file is empty", field="file")
    text = await service.read_text(file, field="file")
    if text is None:
        raise invalid("file", "file: the audio file contains no recipe")
    return text


def _parse(text: str | bytes) -> Recipe:
    """Parse a recipe. Raises RequestValidationError that names the invalid fields."""
    if len(text) > MOST_BYTES:
        raise invalid("recipe", f"recipe: longer than {MOST_BYTES} bytes")
    if isinstance(text, bytes):
        text = text.removeprefix(codecs.BOM_UTF8)  # some editors and shells write a byte order mark first
    with suppress(ValueError):  # Pydantic reports invalid JSON below
        _refuse_long_lists(pydantic_core.from_json(text))
    if has_more_marks(text if isinstance(text, bytes) else text.encode("utf-8", "replace"), _MOST_MARKS):
        raise invalid("recipe", f"recipe: more than {_MOST_MARKS} lists, objects and commas")
    try:
        return Recipe.model_validate_json(text)
    except ValidationError as error:
        if error.error_count() > _MOST_FAULTS:  # listing them would block the event loop for seconds
            raise invalid("recipe", f"recipe: more than {_MOST_FAULTS} fields are unknown or invalid") from error
        faults = [
            {**fault, "loc": ("body", *(fault["loc"] or ("recipe",)))} for fault in error.errors(include_url=False)
        ]
        raise RequestValidationError([_short(fault) for fault in faults]) from error


def _refuse_long_lists(sent: object) -> None:
    """Raise RequestValidationError if a list has more entries than a recipe allows.

    Pydantic would build an error for each entry, and block the event loop for most of a second.
    """
    for name, part in sent.items() if isinstance(sent, dict) else ():
        most = MOST_SECTIONS if name == "sections" else MOST_REGIONS
        if isinstance(part, list) and len(part) > most:
            raise invalid(name, f"{name}: more than {most} entries")


def _short(fault: dict[str, Any]) -> dict[str, Any]:
    """Shorten the input in an error entry, so that a response never repeats a whole recipe."""
    is_plain = isinstance(fault["input"], int | float | bool | None) or len(str(fault["input"])) <= _MOST_REPEATED_CHARS
    place = tuple(part[:_MOST_REPEATED_CHARS] if isinstance(part, str) else part for part in fault["loc"])
    return {**fault, "loc": place, "input": fault["input"] if is_plain else None}


def _require_model(service: Service, recipe: Recipe) -> ModelCard:
    """Return the recipe's model.

    Raises InvalidRequestError if the model is unknown, or if the recipe exceeds a limit of this server.
    """
    card = service.backend.catalog.resolve(recipe.model)
    limits = service.settings.api
    longest_s, most_steps = min(limits.max_duration_s, card.max_duration_s), limits.most_steps(card.default_steps)
    if service.settings.dialects.recipes:  # recipes may come from other dialects, which have higher limits
        longest_s, most_steps = card.max_duration_s, max(most_steps, _MOST_STEPS)
    duration_s = 0.0 if recipe.sections else recipe.duration  # the limits of sections are checked below
    for name, value, most in (("duration", duration_s, longest_s), ("steps", recipe.steps or 0, most_steps)):
        if value > most:
            raise invalid(name, f"{name} must be at most {most:g}")
    check_encoding(recipe.encoding)
    if recipe.sampler is not None and recipe.sampler not in card.samplers:
        raise invalid("sampler", f"sampler must be one of {', '.join(card.samplers)} for the model {card.name}")
    sections = [Section(one.duration, one.prompt) for one in recipe.sections or ()]
    overlap_s = recipe.overlap or 0.0
    for fault in find_faults(sections, overlap_s=overlap_s, card=card, limits=limits) if sections else ():
        name, *place = str(fault.field).split(".")
        raise invalid("overlap" if name == "overlap_s" else ".".join([name, *place]), fault.message)
    duration_s = total_duration_s(sections) if sections else recipe.duration
    if not math.isclose(recipe.duration, duration_s, abs_tol=1e-6):
        raise invalid("duration", f"duration must be the sum of the sections' durations, {duration_s:g}")
    recipe.finishing.check(duration_s=duration_s, is_loop=recipe.loop is not None)
    for start_s, end_s in recipe.inpaint_regions or ():
        if end_s > recipe.duration:
            raise invalid("inpaint_regions", f"inpaint_regions: {start_s:g} to {end_s:g} exceeds the duration")
    return card


async def _find_sources(
    service: Service, recipe: Recipe, *, card: ModelCard, uploads: list[UploadFile]
) -> dict[str, SourceAudio]:
    """Return the decoded source audio of a recipe by SHA-256. Raises RequestValidationError if a file is missing."""
    if not recipe.hashes:
        return {}
    found = await service.compute(lambda: {hash_file(upload.file): upload for upload in uploads})
    missing = [sha256 for sha256 in recipe.hashes if sha256 not in found]
    if missing:
        raise invalid("audio", f"audio: upload the source files of the recipe; missing SHA-256: {', '.join(missing)}")
    decode = partial(service.decode, card=card, padding_s=recipe.duration_padding_sec)
    sources = {sha256: await decode(found[sha256]) for sha256 in recipe.hashes}
    mixed = {source.sha256 for source in (recipe.init_audio, recipe.inpaint_audio) if source and source.is_mixed}
    return await service.compute(
        lambda: {key: audio.to_mono() if key in mixed else audio for key, audio in sources.items()}
    )
