"""ElevenLabs' API for sound effects and music, and the two routes with which its clients check a key."""

from __future__ import annotations

import math
import re
import uuid
from collections.abc import Iterator, Mapping
from enum import StrEnum
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import APIRouter, Query
from fastapi.exceptions import RequestValidationError
from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, StringConstraints
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from stable_audio_serve.api.answers import SOUND_HEADERS, encoded_answer, file_chunks, sound_headers
from stable_audio_serve.api.compat.hosted import resolve_model
from stable_audio_serve.api.description import error_responses
from stable_audio_serve.api.fields import Finite, Prompt
from stable_audio_serve.api.middleware.observe import note
from stable_audio_serve.api.printable import printable
from stable_audio_serve.api.refusals import STATUS, Refusals, in_dialect, invalid
from stable_audio_serve.api.routing import route_class
from stable_audio_serve.api.section_audio import piece_answer
from stable_audio_serve.api.service import Output, Service, resolve_seed
from stable_audio_serve.audio.finish import ClipOrigin, FileOrder
from stable_audio_serve.audio.formats import SAMPLE_RATES_HZ, media_type
from stable_audio_serve.audio.seams import LEAST_SURPLUS_S
from stable_audio_serve.core.catalog import SA3_FAMILY, ModelCard, ModelCatalog
from stable_audio_serve.core.errors import InvalidRequestError, StableAudioError, UnknownModelError
from stable_audio_serve.core.generation import GenerationRequest, Section
from stable_audio_serve.core.ids import JobId
from stable_audio_serve.core.settings import ApiSettings
from stable_audio_serve.core.sound import AudioFormat, Encoding
from stable_audio_serve.jobs.job import JobSpec
from stable_audio_serve.jobs.pieces.sections import choose_overlap, find_faults, longest_s, section_peaks

TAG = "ElevenLabs"

_SOUND_MODELS = ("eleven_text_to_sound_v2", "eleven_text_to_sound_v3")
_MUSIC_MODELS = ("music_v1", "music_v2", "music_v2_5")
_SOUND_S = (0.5, 30.0)
_UNSET_SOUND_S, _UNSET_MUSIC_MS = 5.0, 30_000
# A length in a text: "10 second", "2 s". Without a space, "80s" may be a decade, so only short lengths count.
_LENGTH = re.compile(r"(?<![\w.])(\d{1,4}(?:\.\d{1,3})?|\.\d{1,3})(?:([\s-]*sec(?:s|onds?)?|\s+s)|s)\b", re.IGNORECASE)

_FORMATS = (
    *("mp3_22050_32", "mp3_24000_48", *(f"mp3_44100_{kbps}" for kbps in (32, 64, 96, 128, 192))),
    *(f"opus_48000_{kbps}" for kbps in (32, 64, 96, 128, 192)),
    *(f"{name}_{rate_hz}" for name in ("pcm", "wav") for rate_hz in SAMPLE_RATES_HZ),
    *("ulaw_8000", "alaw_8000"),
)
_MUSIC_FORMATS = ("auto", *_FORMATS, *(f"mp3_48000_{kbps}" for kbps in (128, 192, 240, 320)))
SoundFormat = StrEnum("SoundFormat", {name.upper(): name for name in _FORMATS})  # type: ignore[misc]
MusicFormat = StrEnum("MusicFormat", {name.upper(): name for name in _MUSIC_FORMATS})  # type: ignore[misc]
_DEFAULT_FORMAT = "mp3_44100_128"
_AUTO = dict.fromkeys(_MUSIC_MODELS[1:], "mp3_48000_192")  # for other models: _DEFAULT_FORMAT

_WORDS = {401: "invalid_api_key", 403: "missing_permissions", 429: "too_many_concurrent_requests"}
# This dialect's names for fields of `GenerationRequest` that a model may refuse.
_SOUND_FIELDS = {"prompt": "text", "duration": "duration_seconds", "cfg_scale": "prompt_influence"}
_Style = Annotated[str, StringConstraints(strip_whitespace=True, max_length=1000)]
_Styles = Annotated[list[_Style], Field(max_length=50)]


class _Body(BaseModel):
    """Base of the request models. Unknown fields are ignored, as by the original."""

    model_config = ConfigDict(extra="ignore", frozen=True)


def _refuse_source(value: object) -> None:
    if value is not None:
        raise ValueError("must be null: songs are not stored")


_StoredSong = Annotated[None, BeforeValidator(_refuse_source), Field(description="Must be null.")]


class SoundBody(_Body):
    """A sound effect."""

    text: Prompt = Field(description="Description of the sound.", examples=["a door slams"])
    loop: StrictBool | None = Field(None, description="Whether the sound repeats without a seam; null = false.")
    duration_seconds: Finite | None = Field(
        None, ge=_SOUND_S[0], le=_SOUND_S[1], description="Seconds; null = a length that the text names, or 5."
    )
    prompt_influence: Finite | None = Field(
        None, ge=0, le=1, description="Guidance of base models is 1 + 6 x this; distilled ones have none; null = 0.3."
    )
    model_id: str | None = Field(None, description=f"{', '.join(_SOUND_MODELS)}, or a model of this server.")


class PlanSection(_Body):
    """A part of a composition plan. Lyrics are ignored."""

    section_name: _Style = ""
    positive_local_styles: _Styles = Field(
        [], validation_alias=AliasChoices("positive_local_styles", "positive_styles")
    )
    duration_ms: int = Field(ge=3000, le=120_000)
    source_from: _StoredSong = None
    conditioning_ref: _StoredSong = None


class Plan(_Body):
    """A composition plan: styles of the whole piece, and its sections. `music_v2` calls sections chunks."""

    positive_global_styles: _Styles = []
    negative_global_styles: _Styles = []
    sections: list[PlanSection] = Field(
        min_length=1, max_length=30, validation_alias=AliasChoices("sections", "chunks")
    )

    def parts(self) -> Iterator[tuple[str, float]]:
        """Yield the prompt and the seconds of each section."""
        for section in self.sections:
            styles = dict.fromkeys((*self.positive_global_styles, *section.positive_local_styles))
            yield ", ".join(filter(None, styles)) or section.section_name or "music", section.duration_ms / 1000


class MusicBody(_Body):
    """A piece of music, from a prompt or a composition plan."""

    prompt: Prompt | None = Field(None, description="Description of the music, unless there is a plan.")
    composition_plan: Plan | None = None
    music_length_ms: int | None = Field(None, ge=3000, le=600_000, description="Only with a prompt; null = 30,000.")
    model_id: str | None = Field(None, description=f"{', '.join(_MUSIC_MODELS)}, or a model of this server.")
    seed: int | None = Field(None, ge=0, le=2**32 - 1, description="Null = random. The header x-seed returns the seed.")
    force_instrumental: StrictBool | None = Field(None, description="Accepted: models do not sing.")
    respect_sections_durations: StrictBool | None = Field(None, description="Accepted: sections have their length.")
    sign_with_c2pa: StrictBool | None = Field(None, description="Accepted: files are not signed.")
    store_for_inpainting: StrictBool | None = Field(None, description="Must be false or null.")
    finetune_id: str | None = Field(None, description="Must be null.")


# What the clients require of a user and a model. Nothing is charged, so counts and limits are fixed.
_USER: Mapping[str, Any] = {
    "subscription": {
        **{"tier": "self-hosted", "status": "active", "currency": "usd", "character_count": 0},
        **{"character_limit": 1_000_000, "max_credit_limit_extension": "unlimited"},
        **dict.fromkeys((f"can_extend_{what}_limit" for what in ("character", "voice")), False),
        **dict.fromkeys((f"can_use_{kind}_voice_cloning" for kind in ("instant", "professional")), False),
        **dict.fromkeys((f"{who}voice_{what}" for who in ("", "professional_") for what in ("slots_used", "limit")), 0),
        **{"professional_voice_slots_used_in_workspace": 0, "voice_add_edit_counter": 0},
        **{"allowed_to_extend_character_limit": False, "current_overage": {"amount": "0", "currency": "usd"}},
    },
    **dict.fromkeys(("is_new_user", "can_use_delayed_payment_methods"), False),
    **dict.fromkeys(("is_onboarding_completed", "is_onboarding_checklist_completed"), True),
    **{"created_at": 0, "seat_type": "workspace_member"},
}
_MODEL: Mapping[str, Any] = {
    **dict.fromkeys(("can_do_text_to_speech", "can_do_voice_conversion", "can_be_finetuned"), False),
    "languages": [{"language_id": "en", "name": "English"}],
}


class ElevenLabsError(BaseModel):
    """Any error except invalid fields: `status`, a word for programs, and `message`."""

    detail: dict[str, str]


_Faults = dict[str, list[dict[str, Any]]]  # `detail`: `loc`, `msg` and `type` of each invalid field
_BINARY = {"schema": {"type": "string", "format": "binary"}}
_AUDIO: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The audio file.",
        "content": {media_type(AudioFormat(name)): _BINARY for name in ("mp3", "opus", "pcm", "wav", "ulaw", "alaw")},
        "headers": SOUND_HEADERS,
    },
    422: {"model": _Faults, "description": "A field is missing, of the wrong type or out of range."},
    **error_responses(ElevenLabsError, 401, 408, 413, 429, 500, 503, 504),
}
_Logging = Annotated[bool, Query(description="Accepted: prompts are not logged either way.")]
_FormatField = Query(description="Format, sample rate, and bit rate in kbit/s.")


def build_router(service: Service) -> APIRouter:
    """Return the dialect's routes, except the list of models, whose path other dialects have too."""
    router = APIRouter(
        route_class=route_class(render_error, scopes=("generate",)), tags=[TAG], strict_content_type=False
    )
    default = _choose(service.backend.catalog, service.settings.dialects.elevenlabs_model)

    async def run(request: Request, generation: GenerationRequest, *, card: ModelCard, name: str) -> Output:
        """Generate a clip and encode its file."""
        started_at = service.clock.monotonic()
        card, generation = service.adapted(card, generation)
        note(request.scope, model=card.name, duration_s=generation.duration_s)
        result = await service.generate(card, generation, caller=request.state.caller, started_at=started_at)
        origin = ClipOrigin.of(generation) if service.settings.dialects.recipes else None
        order = FileOrder(service.settings.audio.peaks, encoding=_encoding(name), origin=origin)
        output = await service.finish(result, order)
        note(request.scope, num_bytes=output.file.num_bytes)
        return output

    @router.post("/v1/sound-generation", summary="Sound effect (ElevenLabs)", response_class=Response, responses=_AUDIO)
    async def make_sound(
        request: Request,
        body: SoundBody,
        *,
        output_format: Annotated[SoundFormat, _FormatField] = SoundFormat(_DEFAULT_FORMAT),
        enable_logging: _Logging = True,
    ) -> Response:
        """Generate a sound effect from a text."""
        card = resolve_model(service.backend.catalog, body.model_id, names=_SOUND_MODELS, default=default)
        generation = _to_sound(body, card, request_id=request.state.request_id)
        output = await run(request, generation, card=card, name=output_format)
        return encoded_answer(output.file, sound_headers(output.clips, output.result.made_on))

    @router.post("/v1/music", summary="Music (ElevenLabs)", response_class=Response, responses=_AUDIO)
    @router.post("/v1/music/stream", summary="Music in pieces (ElevenLabs)", response_class=Response, responses=_AUDIO)
    async def make_music(
        request: Request,
        body: MusicBody,
        *,
        output_format: Annotated[MusicFormat, _FormatField] = MusicFormat(_DEFAULT_FORMAT),
        enable_logging: _Logging = True,
    ) -> Response:
        """Generate music from a prompt or a composition plan. `/stream` sends it without a Content-Length.

        With several sections, the stream begins when the first section is finished; in Opus, when all are.
        """
        card = resolve_model(service.backend.catalog, body.model_id, names=_MUSIC_MODELS, default=default)
        request.state.length_field = _length_field(body)
        generation, sections = _to_music(body, card, limits=service.settings.api, request_id=request.state.request_id)
        name = _AUTO.get(body.model_id or "", _DEFAULT_FORMAT) if output_format == "auto" else str(output_format)
        is_stream = request.url.path.endswith("/stream")
        if sections:
            spec = JobSpec(
                id=JobId(uuid.uuid4().hex),
                contract="elevenlabs",
                model=card.name,
                mode="long-piece",
                request=generation,
                encoding=_encoding(name),
                peaks=section_peaks(service.settings.audio.peaks),
                with_recipe=service.settings.dialects.recipes,
                sections=sections,
                overlap_s=choose_overlap(None, card=card, limits=service.settings.api),
                client=request.state.client,
            )
            note(request.scope, model=card.name, duration_s=generation.duration_s, job_id=spec.id)
            return await piece_answer(service, request, spec=spec, card=card, is_stream=is_stream)
        output = await run(request, generation, card=card, name=name)
        headers = sound_headers(output.clips, output.result.made_on)
        headers |= {} if is_stream else {"Content-Length": str(output.file.num_bytes)}
        return StreamingResponse(file_chunks(output.file), headers=headers, media_type=output.file.media_type)

    _add_user(router)
    return router


def _add_user(router: APIRouter) -> None:
    async def show_user(request: Request) -> dict[str, Any]:
        """Describe the key. Clients call this to check it."""
        name = request.state.caller.key.label or "anybody"
        return {**dict.fromkeys(("user_id", "workspace_id", "first_name"), name), **_USER}

    router.add_api_route(
        "/v1/user",
        show_user,
        methods=["GET"],
        summary="User (ElevenLabs)",
        responses=error_responses(ElevenLabsError, 401, 503),
        route_class_override=route_class(render_error, scopes=()),
    )


def list_models(catalog: ModelCatalog) -> list[dict[str, Any]]:
    """Return the served models in ElevenLabs' format."""
    return [{"model_id": card.name, "name": card.name, "description": card.description, **_MODEL} for card in catalog]


def _choose(catalog: ModelCatalog, name: str | None) -> ModelCard:
    """Return the model `name`. If `name` is None, return the first model for sound effects.

    If `name` is None and there is no model for sound effects, return the first Stable Audio 3 model.
    """
    if name is None:
        name = next((card.name for card in catalog if "sfx" in card.name), None)
    return catalog.choose(name, family=SA3_FAMILY)


def _to_sound(body: SoundBody, card: ModelCard, *, request_id: str) -> GenerationRequest:
    longest_s = min(_SOUND_S[1], card.max_duration_s - (LEAST_SURPLUS_S if body.loop else 0))
    duration_s = min(_named_length(body.text), longest_s) if body.duration_seconds is None else body.duration_seconds
    if duration_s > longest_s:
        raise _fault("duration_seconds", f"must be from {_SOUND_S[0]:g} to {longest_s:g} for the model {card.name}")
    influence = 0.3 if body.prompt_influence is None else body.prompt_influence
    return GenerationRequest(
        prompt=body.text,
        duration_s=duration_s,
        seed=resolve_seed(-1),
        cfg_scale=1 + 6 * influence if card.default_cfg_scale > 1 else None,
        loop="free" if body.loop else None,
        request_id=request_id,
    )


def _named_length(text: str) -> float:
    """Return the length in seconds that a text names, within the allowed range, or the default."""
    for number, word in _LENGTH.findall(text):
        if word or float(number) <= _SOUND_S[1]:
            return min(max(float(number), _SOUND_S[0]), _SOUND_S[1])
    return _UNSET_SOUND_S


def _to_music(
    body: MusicBody, card: ModelCard, *, limits: ApiSettings, request_id: str
) -> tuple[GenerationRequest, tuple[Section, ...]]:
    """Return the request for music, and the sections of the piece, or () if the piece is a single clip.

    Raises RequestValidationError for fields that contradict each other or have no meaning here.
    """
    plan = body.composition_plan
    if (body.prompt is None) == (plan is None):
        raise _fault("prompt", "send either prompt or composition_plan")
    if body.finetune_id is not None:
        raise _fault("finetune_id", "must be null: this server has no finetunes; select a model with model_id")
    if body.store_for_inpainting:
        raise _fault("store_for_inpainting", "must be false or null: songs are not stored")
    length_ms = _UNSET_MUSIC_MS if body.music_length_ms is None else body.music_length_ms
    parts = [(body.prompt or "", length_ms / 1000)] if plan is None else list(plan.parts())
    request = GenerationRequest(
        prompt=parts[0][0],
        duration_s=sum(seconds for _, seconds in parts),
        seed=resolve_seed(-1 if body.seed is None else body.seed),
        negative_prompt=", ".join(filter(None, plan.negative_global_styles)) or None if plan else None,
        request_id=request_id,
    )
    if len(parts) == 1 and request.duration_s <= card.max_duration_s:
        return request, ()
    overlap_s = choose_overlap(None, card=card, limits=limits)
    counts = [math.ceil(seconds / (longest_s(card, limits) - overlap_s) - 1e-9) for _, seconds in parts]
    sections = tuple(
        Section(seconds / count, prompt)
        for (prompt, seconds), count in zip(parts, counts, strict=True)
        for _ in range(count)
    )
    for fault in find_faults(sections, overlap_s=overlap_s, card=card, limits=limits):
        raise _fault(_length_field(body), fault.message)
    return request, sections


def _length_field(body: MusicBody) -> str:
    return "music_length_ms" if body.composition_plan is None else "composition_plan"


def _encoding(name: str) -> Encoding:
    """Return the encoding that a value of `output_format` names: format, sample rate and bit rate."""
    file_format, rate_hz, *kbps = name.split("_")
    return Encoding(AudioFormat(file_format), int(kbps[0]) if kbps else None, sample_rate_hz=int(rate_hz))


def _fault(field: str, message: str) -> RequestValidationError:
    return invalid(field, f"{field}: {message}")


def _is_sound(request: Request) -> bool:
    return request.url.path.endswith("sound-generation")


def _parse_fault(request: Request, fault: Mapping[str, Any]) -> list[dict[str, Any]]:
    place = fault["loc"]
    if fault["type"] == "json_invalid":  # then FastAPI's location ends with a character position
        place = ("body",)
    elif place == ("body",) and fault["type"] == "missing":  # there is no body
        place = ("body", "text" if _is_sound(request) else "prompt")
    return [{"loc": printable(place), "msg": printable(fault["msg"]), "type": fault["type"]}]


def _find_fault(request: Request, error: StableAudioError) -> dict[str, Any] | None:
    if not isinstance(error, InvalidRequestError):
        return None
    length_field = getattr(request.state, "length_field", "music_length_ms")
    names = _SOUND_FIELDS if _is_sound(request) else {"duration": length_field}
    field = "model_id" if isinstance(error, UnknownModelError) else error.field or "prompt"
    name, message = in_dialect(field, error.message, names=names)
    return {"loc": ["body", name], "msg": message, "type": "value_error"}


def _answer(status: int, message: str, *, headers: Mapping[str, str] | None) -> Response:
    word = _WORDS.get(status) or HTTPStatus(status).phrase.lower().replace(" ", "_")
    return JSONResponse({"detail": {"status": word, "message": message}}, status, headers=dict(headers or {}))


_REFUSALS: Refusals[int, dict[str, Any], Response] = Refusals(
    table={**STATUS, "overloaded": 429},
    internal=500,
    internal_message="generation failed; request id {request_id}",
    parse_fault=_parse_fault,
    find_fault=_find_fault,
    name_field=lambda fault: fault["loc"][-1],
    answer_fields=lambda _, faults: JSONResponse({"detail": faults}, 422),
    answer_http=lambda _, error: _answer(error.status_code, str(error.detail), headers=error.headers),
    answer_error=lambda _, refusal: _answer(refusal.row, refusal.message, headers=refusal.headers),
)
render_error = _REFUSALS.answer  # returns the response to an expected error
