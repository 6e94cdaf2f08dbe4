"""What the two hosted `stable-audio` APIs (AIML, fal) share: clips of whole seconds up to 47, from one chosen model."""

from __future__ import annotations

from typing import Annotated

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from stable_audio_serve.api.fields import PEAKS_DESCRIPTION, Prompt
from stable_audio_serve.api.service import resolve_seed
from stable_audio_serve.core.catalog import ModelCard
from stable_audio_serve.core.generation import GenerationRequest
from stable_audio_serve.core.sound import Peaks

MAX_S = 47
DEFAULT_S = 30
DEFAULT_STEPS = 100
START_DESCRIPTION = "Where the clip lies in an imagined longer one, seconds; for models that know it."


def _check_number(value: object) -> object:
    if isinstance(value, bool | str | bytes):  # Pydantic would convert these, the original APIs refuse them
        raise PydanticCustomError("int_type", "Input should be a valid integer")
    return value


WholeNumber = Annotated[int, BeforeValidator(_check_number)]


class ClipInput(BaseModel):
    """What a client of either chooses; where the clip starts and the steps have ranges of their own in each."""

    model_config = ConfigDict(extra="ignore", frozen=True, protected_namespaces=())

    prompt: Prompt = Field(description="What to hear.")
    seconds_start: WholeNumber
    seconds_total: WholeNumber = Field(
        DEFAULT_S, ge=1, le=MAX_S, description="Length, seconds; unset = at most what the model can do."
    )
    steps: WholeNumber
    peaks: Peaks | None = Field(None, description=PEAKS_DESCRIPTION)


def to_request(fields: ClipInput, card: ModelCard, *, request_id: str) -> GenerationRequest:
    """Returns the request for `fields`. Raises RequestValidationError for a clip longer than the model's.

    The default length shrinks to what the model can do.
    """
    longest_s = min(MAX_S, int(card.max_duration_s))
    duration_s = fields.seconds_total if "seconds_total" in fields.model_fields_set else min(DEFAULT_S, longest_s)
    if duration_s > longest_s:
        message = f"Input should be less than or equal to {longest_s}: the longest clip of the model {card.name}"
        fault = {"type": "less_than_equal", "loc": ("body", "seconds_total"), "msg": message, "input": duration_s}
        raise RequestValidationError([{**fault, "ctx": {"le": longest_s}}])
    return GenerationRequest(
        prompt=fields.prompt,
        duration_s=duration_s,
        seed=resolve_seed(-1),
        start_s=fields.seconds_start,
        conditioned_total_s=duration_s,
        steps=fields.steps,
        request_id=request_id,
    )
