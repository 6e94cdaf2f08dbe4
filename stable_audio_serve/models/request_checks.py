"""Checks what every model family requires of a request: valid text, finite numbers, at least one variation."""

from __future__ import annotations

import math

from stable_audio_serve.core.errors import InvalidRequestError
from stable_audio_serve.core.generation import MAX_PROMPT_CHARS, GenerationRequest


def check_request(request: GenerationRequest) -> None:
    """Raise InvalidRequestError, which names the field, if no model can use one of the request's values."""
    name = "prompts" if request.variation_prompts else "prompt"
    prompts = [(name, prompt) for prompt in request.prompts]
    for field, text in (*prompts, ("negative_prompt", request.negative_prompt or "")):
        try:
            text.encode()  # raises an error for lone surrogates: JSON can contain them, but tokenizers cannot read them
        except UnicodeEncodeError:
            raise InvalidRequestError(f"{field} is not valid Unicode text", field=field) from None
        if len(text) > MAX_PROMPT_CHARS:
            message = f"{field} must have at most {MAX_PROMPT_CHARS} characters"
            raise InvalidRequestError(message, field=field, allowed=f"0..{MAX_PROMPT_CHARS} characters")
    if request.batch_size < 1:
        raise InvalidRequestError("batch_size must be at least 1", field="batch_size", allowed=">= 1")
    for field, values in (("prompts", request.variation_prompts), ("seeds", request.variation_seeds)):
        if values and len(values) != request.batch_size:
            message = f"{field} must have as many entries as batch_size, {request.batch_size}"
            raise InvalidRequestError(message, field=field, allowed=f"{request.batch_size} entries")
    for field, value in (
        ("cfg_scale", request.cfg_scale),
        ("apg_scale", request.apg_scale),
        ("scale_phi", request.cfg_rescale),
        ("cfg_norm_threshold", request.cfg_norm_threshold),
        ("cfg_interval", sum(request.cfg_interval)),
        ("duration_padding_sec", request.duration_padding_s),
        ("seconds_start", request.start_s),
        ("seconds_total", request.conditioned_total_s),
        ("negative_seconds_start", request.negative_start_s),
        ("negative_seconds_total", request.negative_total_s),
    ):
        if value is not None and not math.isfinite(value):
            raise InvalidRequestError(f"{field} must be a finite number", field=field)
    if request.source_start_s and not 0 <= request.source_start_s < request.duration_s:
        message = "the source must begin in the clip"
        raise InvalidRequestError(message, field="extend_before_s", allowed=f"0..{request.duration_s:g}")
    if request.duration_padding_s is not None and request.duration_padding_s < 0:
        raise InvalidRequestError("duration_padding_sec must not be negative", field="duration_padding_sec")
