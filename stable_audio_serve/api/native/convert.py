"""Maps our wire forms to `GenerationRequest`, with the checks that depend on settings and on the model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pydantic_core
import structlog
from fastapi.exceptions import RequestValidationError

from stable_audio_serve.api.native.schemas import Controls, VariationForm, check_sampler_kwargs
from stable_audio_serve.api.service import resolve_seed
from stable_audio_serve.core.catalog import ModelCard, ModelCatalog
from stable_audio_serve.core.errors import InvalidRequestError, UnknownModelError
from stable_audio_serve.core.generation import GenerationRequest
from stable_audio_serve.core.settings import ApiSettings

log = structlog.get_logger("stable_audio_serve.api")


def parse_sampler_kwargs(text: str) -> dict[str, Any]:
    """Returns the JSON object of a form field, {} for a blank one.

    Raises InvalidRequestError, RequestValidationError.
    """
    if not text.strip():
        return {}
    try:
        values = pydantic_core.from_json(text)
    except ValueError as error:
        raise InvalidRequestError("sampler_kwargs is not valid JSON", field="sampler_kwargs") from error
    if not isinstance(values, dict):
        raise InvalidRequestError("sampler_kwargs must be a JSON object", field="sampler_kwargs")
    try:
        return check_sampler_kwargs(values)
    except ValueError as error:
        raise RequestValidationError([_fault("sampler_kwargs", str(error), value=values)]) from error


def to_request(
    fields: Controls, sampler_kwargs: dict[str, Any], *, catalog: ModelCatalog, limits: ApiSettings, request_id: str
) -> tuple[ModelCard, GenerationRequest]:
    """Returns the model and the request for `fields`, without source audio. Raises RequestValidationError."""
    given = fields.model_fields_set
    try:
        card = catalog.resolve(fields.model) if "model" in given else catalog.default
    except UnknownModelError as error:
        raise RequestValidationError([_fault("model", error.message, value=fields.model)]) from error
    longest_s = min(limits.max_duration_s, card.max_duration_s)
    duration_s = fields.duration if "duration" in given else min(fields.duration, longest_s)
    steps = fields.steps if "steps" in given else min(card.default_steps, limits.max_steps)
    is_model_shorter = card.max_duration_s < limits.max_duration_s
    faults = [
        _fault(name, f"{name} must be at most {limit:g} ({setter})", value=value)
        for name, value, limit, setter in (
            ("duration", duration_s, longest_s, f"the model {card.name}" if is_model_shorter else "api.max_duration_s"),
            ("steps", steps, limits.max_steps, "api.max_steps"),
            ("batch_size", fields.batch_size, limits.max_batch_size, "api.max_batch_size"),
            ("deadline_s", fields.deadline_s or 0, limits.max_deadline_s, "api.max_deadline_s"),
        )
        if value > limit
    ]
    sampler, scale_phi, norm_threshold = _sampler_options(sampler_kwargs, card, faults=faults)
    if faults:
        raise RequestValidationError(faults)
    request = GenerationRequest(
        prompt=fields.prompt,
        duration_s=duration_s,
        seed=resolve_seed(fields.seed),
        negative_prompt=fields.negative_prompt,
        batch_size=fields.batch_size,
        steps=steps,
        cfg_scale=fields.cfg_scale if "cfg_scale" in given else None,
        sampler=sampler,
        apg_scale=fields.apg_scale if "apg_scale" in given else None,
        cfg_rescale=scale_phi,
        cfg_norm_threshold=norm_threshold,
        duration_padding_s=fields.duration_padding_sec if "duration_padding_sec" in given else None,
        chunked_decode=fields.chunked_decode,
        deadline_s=fields.deadline_s,
        priority=fields.priority,
        request_id=request_id,
    )
    return card, request


def to_edit(generation: GenerationRequest, form: VariationForm, *, card: ModelCard) -> GenerationRequest:
    """Returns the request with a variation's noise, its source still missing. Raises RequestValidationError.

    A share of noise becomes the level of samplers over sigma.
    """
    if form.edit_schedule is not None and card.objective == "v":
        message = f"edit_schedule has no meaning for the model {card.name}: its samplers run over sigma"
        raise RequestValidationError([_fault("edit_schedule", message, value=form.edit_schedule)])
    level = card.noise_level(form.init_noise_level, sampler=generation.sampler)
    return replace(generation, init_noise_level=level, edit_schedule=form.edit_schedule)


def _sampler_options(
    values: dict[str, Any], card: ModelCard, *, faults: list[dict[str, Any]]
) -> tuple[str | None, float, float]:
    """Returns the three supported options; adds what is wrong with them to `faults`, ignores other keys."""
    values = {key: value for key, value in values.items() if value is not None}
    sampler = values.pop("sampler_type", None)
    scale_phi = values.pop("scale_phi", 0.0)
    norm_threshold = values.pop("cfg_norm_threshold", 0.0)
    if values:
        log.info("sampler_kwargs ignored", keys=sorted(key[:50] for key in values)[:20])
    if sampler is not None and (not isinstance(sampler, str) or sampler.strip() not in card.samplers):
        message = f"sampler_kwargs.sampler_type must be one of {', '.join(card.samplers)} for the model {card.name}"
        faults.append(_fault("sampler_kwargs", message, value=sampler))
    if not _is_number(scale_phi) or not 0 <= scale_phi <= 1:
        faults.append(
            _fault("sampler_kwargs", "sampler_kwargs.scale_phi must be a number from 0 to 1", value=scale_phi)
        )
    if not _is_number(norm_threshold) or not 0 <= norm_threshold <= 1e6:
        message = "sampler_kwargs.cfg_norm_threshold must be a number from 0 to 1e6"
        faults.append(_fault("sampler_kwargs", message, value=norm_threshold))
    if faults:
        return None, 0.0, 0.0
    return sampler.strip() if sampler else None, float(scale_phi), float(norm_threshold)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _fault(field: str, message: str, *, value: object) -> dict[str, Any]:
    return {"type": "value_error", "loc": ("body", field), "msg": message, "input": value}
