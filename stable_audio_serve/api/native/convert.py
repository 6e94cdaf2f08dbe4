"""Convert native request models to `GenerationRequest`, and check limits that depend on the settings or the model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, TypeVar

import pydantic_core
from fastapi.exceptions import RequestValidationError
from pydantic import Field, TypeAdapter, ValidationError

from stable_audio_serve.api.fields import Prompt
from stable_audio_serve.api.json_values import MAX_MARKS, has_more_marks
from stable_audio_serve.api.native.schemas import (
    MAX_LORAS,
    MAX_VARIATIONS,
    Fields,
    GenerationBody,
    JobBody,
    LoraBody,
    LoudnessBody,
    UploadForm,
    VariationForm,
    check_sampler_kwargs,
)
from stable_audio_serve.api.refusals import invalid, to_fault
from stable_audio_serve.api.service import resolve_seed
from stable_audio_serve.audio.formats import check_encoding
from stable_audio_serve.audio.loops import BEATS_PER_BAR
from stable_audio_serve.audio.seams import LEAST_SURPLUS_S
from stable_audio_serve.core.catalog import OPEN_FAMILY, ModelCard, ModelCatalog
from stable_audio_serve.core.errors import InvalidRequestError, UnknownModelError
from stable_audio_serve.core.generation import GenerationRequest, LoopStart, Lora, Section
from stable_audio_serve.core.settings import ApiSettings
from stable_audio_serve.core.sound import Encoding, Finishing, Loudness
from stable_audio_serve.jobs.pieces.sections import choose_overlap, find_faults, total_duration_s

T = TypeVar("T")

# The numeric options of `sampler_kwargs`, for Stable Audio Open models (True) and for other models (False). The name of
# an option maps to the field of `GenerationRequest` that it sets, its lowest value and its highest value. Stable Audio
# Open models do not support a norm threshold, so only 0 is allowed.
_RESCALE = {"scale_phi": ("cfg_rescale", 0.0, 1.0)}
_OPTIONS: Mapping[bool, Mapping[str, tuple[str, float, float]]] = {
    False: {**_RESCALE, "cfg_norm_threshold": ("cfg_norm_threshold", 0.0, 1e6)},
    True: {
        **_RESCALE,
        "cfg_norm_threshold": ("cfg_norm_threshold", 0.0, 0.0),
        "sigma_min": ("sigma_min", 1e-4, 1e4),
        "sigma_max": ("sigma_max", 1e-4, 1e4),
        "rho": ("rho", 0.01, 100.0),
    },
}


SAME_S = 0.001  # a sent `duration` may differ by this from the computed duration, seconds
_PROMPTS = TypeAdapter(Annotated[list[Prompt], Field(min_length=1, max_length=MAX_VARIATIONS)])
_SEEDS = TypeAdapter(Annotated[list[int], Field(min_length=1, max_length=MAX_VARIATIONS)])
_LOUDNESS = TypeAdapter(LoudnessBody)
_LORAS = TypeAdapter(Annotated[list[LoraBody], Field(max_length=MAX_LORAS)])


def parse_sampler_kwargs(given: str | dict[str, Any]) -> dict[str, Any]:
    """Return the sampler options of a request. A form sends them as JSON text, and a blank text means {}.

    Raises InvalidRequestError, RequestValidationError.
    """
    if not isinstance(given, str):
        return given
    if not given.strip():
        return {}
    try:
        values = pydantic_core.from_json(given)
    except ValueError as error:
        raise InvalidRequestError("sampler_kwargs is not valid JSON", field="sampler_kwargs") from error
    if not isinstance(values, dict):
        raise InvalidRequestError("sampler_kwargs must be a JSON object", field="sampler_kwargs")
    try:
        return check_sampler_kwargs(values)
    except ValueError as error:
        raise invalid("sampler_kwargs", str(error), value=values) from error


def parse_loras(given: str | Sequence[LoraBody] | None) -> tuple[Lora, ...]:
    """Return the adapters that a request names. A form sends them as JSON text. Raises RequestValidationError."""
    if isinstance(given, str):
        given = _parse_json(_LORAS, given, field="loras")
    return tuple(Lora(one.name, one.strength, _interval(one)) for one in given or ())


def _interval(lora: LoraBody) -> tuple[float, float]:
    low, high = lora.interval or (0.0, 1.0)
    return low, high


def to_finishing(fields: Fields, generation: GenerationRequest) -> Finishing:
    """Return the loudness and the fades of the requested clips. Raises RequestValidationError."""
    loudness = fields.loudness
    if isinstance(loudness, str):
        loudness = _parse_json(_LOUDNESS, loudness, field="loudness")
    finishing = Finishing(
        Loudness(loudness.target_lufs, loudness.true_peak_dbtp) if loudness else None,
        fields.fade_in_s or 0.0,
        fields.fade_out_s or 0.0,
    )
    try:
        finishing.check(duration_s=generation.duration_s, is_loop=generation.loop is not None)
    except InvalidRequestError as error:
        raise invalid(error.field or "", error.message) from error
    return finishing


def _parse_json(parts: TypeAdapter[T], text: str, *, field: str) -> T | None:
    """Return the JSON in a form field, None if the field is blank or null. Raises RequestValidationError."""
    if text.strip() in {"", "null"}:
        return None
    if has_more_marks(text.encode("utf-8", "replace")):
        raise invalid(field, f"{field}: more than {MAX_MARKS} lists, objects and commas")
    try:
        return parts.validate_json(text)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False)
        faults = [{**each, "type": "value_error", "loc": ("body", field, *each["loc"])} for each in found]
        raise RequestValidationError(faults) from error


def to_request(
    fields: Fields, sampler_kwargs: dict[str, Any], *, catalog: ModelCatalog, limits: ApiSettings, request_id: str
) -> tuple[ModelCard, GenerationRequest]:
    """Return the model and the request for `fields`. The request has no source audio. Raises RequestValidationError."""
    given = fields.model_fields_set
    try:
        card = catalog.resolve(fields.model) if "model" in given else catalog.default
    except UnknownModelError as error:
        raise invalid("model", error.message, value=fields.model) from error
    faults: list[dict[str, Any]] = []
    loop, bars_s = _plan_loop(fields, faults=faults)
    prompts, seeds = _plan_variations(fields, faults=faults)
    batch_size = len(prompts or seeds) or fields.batch_size
    counted = "prompts: batch_size" if prompts else "seeds: batch_size" if seeds else "batch_size"
    model_longest_s = card.max_duration_s - (LEAST_SURPLUS_S if loop else 0)
    longest_s = min(limits.max_duration_s, model_longest_s)
    duration_s = bars_s or (fields.duration if "duration" in given else min(fields.duration, longest_s))
    sections = read_sections(fields)
    clip_s = 0.0 if sections else duration_s  # the limits of sections are checked below
    steps = fields.steps if "steps" in given else min(card.default_steps, limits.most_steps(card.default_steps))
    limiter = f"the model {card.name}" if model_longest_s < limits.max_duration_s else "api.max_duration_s"
    faults += [
        to_fault(name.partition(":")[0], f"{name} must be at most {limit:g} ({setter})", value=value)
        for name, value, limit, setter in (
            ("duration" if bars_s is None else "bars: duration", clip_s, longest_s, limiter),
            ("steps", steps, limits.most_steps(card.default_steps), "api.max_steps"),
            (counted, batch_size, limits.max_batch_size, "api.max_batch_size"),
            ("deadline_s", fields.deadline_s or 0, limits.max_deadline_s, "api.max_deadline_s"),
        )
        if value > limit
    ]
    faults += _section_faults(fields, card=card, limits=limits)
    sampling = _sampler_options(sampler_kwargs, card, faults=faults)
    apg_scale = fields.apg_scale if "apg_scale" in given else None
    if apg_scale and card.family == OPEN_FAMILY:
        message = f"apg_scale must be 0 or unset: the model {card.name} does not support it"
        faults.append(to_fault("apg_scale", message, value=apg_scale))
    try:
        check_encoding(to_encoding(fields))
    except InvalidRequestError as error:
        value = getattr(fields, str(error.field))
        faults.append(to_fault(str(error.field), error.message, value=value))
    if faults:
        raise RequestValidationError(faults)
    request = GenerationRequest(
        prompt=prompts[0] if prompts else fields.prompt,
        duration_s=total_duration_s(sections) if sections else duration_s,
        seed=seeds[0] if seeds else resolve_seed(fields.seed),
        negative_prompt=fields.negative_prompt,
        batch_size=batch_size,
        variation_prompts=prompts,
        variation_seeds=seeds,
        steps=steps,
        cfg_scale=fields.cfg_scale if "cfg_scale" in given else None,
        apg_scale=apg_scale,
        duration_padding_s=fields.duration_padding_sec if "duration_padding_sec" in given else None,
        chunked_decode=fields.chunked_decode,
        loop=loop,
        deadline_s=fields.deadline_s,
        priority=fields.priority,
        loras=parse_loras(fields.loras),
        lora_stacking=fields.lora_stacking,
        request_id=request_id,
        **sampling,
    )
    return card, request


def to_encoding(fields: Fields) -> Encoding:
    """Return how a request's file is encoded. `to_request` checks that the format allows the other values."""
    return Encoding(fields.response_format, fields.bitrate, fields.bit_depth, fields.sample_rate)


def _plan_variations(fields: Fields, *, faults: list[dict[str, Any]]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return the prompts and the seeds of the variations, each empty if unset. Appends errors to `faults`.

    Raises RequestValidationError.
    """
    if isinstance(fields, UploadForm):
        prompts = _parse_json(_PROMPTS, fields.prompts, field="prompts")
        seeds = _parse_json(_SEEDS, fields.seeds, field="seeds")
    else:
        prompts, seeds = fields.prompts, fields.seeds
    size, source = fields.batch_size, "batch_size"
    for name, values in (("prompts", prompts), ("seeds", seeds)):
        if values is None:
            continue
        if source == "batch_size" and "batch_size" not in fields.model_fields_set:
            size, source = len(values), name
        elif len(values) != size:
            message = f"{name} must have as many entries as {source}, {size}, not {len(values)}"
            faults.append(to_fault(name, message))
    return tuple(prompts or ()), tuple(resolve_seed(seed) for seed in seeds or ())


def _plan_loop(fields: Fields, *, faults: list[dict[str, Any]]) -> tuple[LoopStart | None, float | None]:
    """Return where the loop begins (None without a loop), and the duration of its bars in seconds (None without bars).

    Appends errors to `faults`.
    """
    if not isinstance(fields, GenerationBody):
        return None, None
    bpm, bars = fields.bpm, fields.bars
    if bpm is None and bars is None:
        return "free" if fields.loop else None, None
    if not fields.loop:
        faults.append(to_fault("loop", "loop must be true with bpm and bars", value=fields.loop))
    if bpm is None or bars is None:
        missing, given = ("bpm", "bars") if bpm is None else ("bars", "bpm")
        faults.append(to_fault(missing, f"{missing} must be set with {given}"))
        return "free", None
    duration_s = bars * BEATS_PER_BAR * 60 / bpm
    if "duration" in fields.model_fields_set and abs(fields.duration - duration_s) > SAME_S:
        message = f"duration must be unset, or {duration_s:g} as {bars} bars at {bpm:g} bpm"
        faults.append(to_fault("duration", message, value=fields.duration))
    return "bars", duration_s


def read_sections(fields: Fields) -> tuple[Section, ...]:
    """Return the sections that a job's fields have, or () if they have none."""
    given = fields.sections if isinstance(fields, JobBody) else None
    return tuple(Section(one.duration, one.prompt) for one in given or ())


def _section_faults(fields: Fields, *, card: ModelCard, limits: ApiSettings) -> list[dict[str, Any]]:
    """Return an error entry for each field that is wrong or contradicts the sections."""
    if not isinstance(fields, JobBody):
        return []
    sections = read_sections(fields)
    if fields.sections == []:
        return [to_fault("sections", "sections must have at least one entry, or be unset", value=[])]
    if not sections:
        unused = fields.overlap_s is not None
        return [to_fault("overlap_s", "overlap_s needs sections", value=fields.overlap_s)] if unused else []
    total_s = total_duration_s(sections)
    has_other_length = "duration" in fields.model_fields_set and not math.isclose(fields.duration, total_s)
    contradicting = (
        ("duration", fields.duration, has_other_length, f"{total_s:g}"),
        ("batch_size", fields.batch_size, fields.batch_size > 1, "1"),
        ("prompts", fields.prompts, bool(fields.prompts), "empty"),
        ("seeds", fields.seeds, bool(fields.seeds), "empty"),
        ("loop", fields.loop, bool(fields.loop), "false"),
        ("peaks", fields.peaks, fields.peaks == "scale", "limit or clip"),
    )
    faults = [
        to_fault(name, f"{name} must be {allowed} or unset with sections", value=value)
        for name, value, is_wrong, allowed in contradicting
        if is_wrong
    ]
    overlap_s = choose_overlap(fields.overlap_s, card=card, limits=limits)
    for error in find_faults(sections, overlap_s=overlap_s, card=card, limits=limits):
        place = tuple(int(part) if part.isdecimal() else part for part in str(error.field).split("."))
        faults.append(to_fault(place, error.message, value=_value_at(fields, place)))
    return faults


def _value_at(fields: JobBody, place: tuple[str | int, ...]) -> Any:
    """Return the value that the client sent at `place`, such as ("sections", 2, "duration"); None for ("sections",)."""
    match place:
        case ("sections", int(index), "duration"):
            return (fields.sections or ())[index].duration
        case ("overlap_s",):
            return fields.overlap_s
    return None


def to_edit(generation: GenerationRequest, form: VariationForm, *, card: ModelCard) -> GenerationRequest:
    """Return `generation` with the noise level and schedule of a variation. The source audio is not added.

    Clients send the noise level as a number from 0 to 1. For samplers that use sigmas, it is converted to a sigma.
    Raises RequestValidationError.
    """
    if form.edit_schedule is not None and card.objective == "v":
        message = f"edit_schedule must be unset: the model {card.name} does not support it"
        raise invalid("edit_schedule", message, value=form.edit_schedule)
    level = card.noise_level(form.init_noise_level, sampler=generation.sampler)
    return replace(generation, init_noise_level=level, edit_schedule=form.edit_schedule)


def _sampler_options(values: dict[str, Any], card: ModelCard, *, faults: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the fields of `GenerationRequest` that `sampler_kwargs` sets. Appends errors to `faults`."""
    values = {key: value for key, value in values.items() if value is not None}
    chosen: dict[str, Any] = {}
    sampler = values.pop("sampler_type", None)
    if sampler is not None and (not isinstance(sampler, str) or sampler.strip() not in card.samplers):
        message = f"sampler_kwargs.sampler_type must be one of {', '.join(card.samplers)} for the model {card.name}"
        faults.append(to_fault("sampler_kwargs", message, value=sampler))
    elif sampler is not None:
        chosen["sampler"] = sampler.strip()
    for key, (field, low, high) in _OPTIONS[card.family == OPEN_FAMILY].items():
        value = values.pop(key, None)
        if value is None:
            continue
        if isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high:
            chosen[field] = float(value)
        else:
            message = f"sampler_kwargs.{key} must be a number from {low:g} to {high:g}"
            faults.append(to_fault("sampler_kwargs", message, value=value))
    if chosen.get("sigma_min", 0.0) >= chosen.get("sigma_max", math.inf):
        faults.append(to_fault("sampler_kwargs", "sampler_kwargs.sigma_min must be below sigma_max", value=values))
    return chosen


def unused_options(values: Mapping[str, Any], card: ModelCard) -> list[str]:
    """Return the keys of `sampler_kwargs` that the model does not use. Stability AI's server ignores them too."""
    used = {"sampler_type", *_OPTIONS[card.family == OPEN_FAMILY]}
    return [key for key, value in values.items() if value is not None and key not in used]
