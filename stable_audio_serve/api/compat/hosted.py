"""Code shared by the APIs of hosting services: their model names, and AIML's and fal's clips of 1 to 47 seconds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from stable_audio_serve.api.fields import PEAKS_DESCRIPTION, Prompt
from stable_audio_serve.api.service import resolve_seed
from stable_audio_serve.artifacts.store import StoredFile
from stable_audio_serve.core.catalog import ModelCard, ModelCatalog
from stable_audio_serve.core.errors import UnknownModelError
from stable_audio_serve.core.generation import GenerationRequest
from stable_audio_serve.core.sound import Peaks

MAX_S = 47
DEFAULT_S = 30
DEFAULT_STEPS = 100
START_DESCRIPTION = "Start of the clip within a longer piece, seconds; used by models conditioned on it."


def check_whole(value: object) -> object:
    """Return `value`. Raises PydanticCustomError for text and booleans."""
    if isinstance(value, bool | str | bytes):  # the original APIs refuse these, but Pydantic would convert them
        raise PydanticCustomError("int_type", "Input should be a valid integer")
    return value


WholeNumber = Annotated[int, BeforeValidator(check_whole)]


class File(BaseModel):
    """A stored file. Its URL needs no key."""

    url: str
    content_type: str
    file_name: str
    file_size: int

    @classmethod
    def of(cls, file: StoredFile, *, url: str) -> File:
        """Describe a stored file that can be downloaded at `url`."""
        return cls(url=url, content_type=file.media_type, file_name=file.file_name, file_size=file.num_bytes)


class ClipInput(BaseModel):
    """The fields that both APIs have. Each API sets its own ranges for the start and the steps."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    prompt: Prompt = Field(description="Description of the sound.")
    seconds_start: WholeNumber
    seconds_total: WholeNumber = Field(
        DEFAULT_S, ge=1, le=MAX_S, description="Length, seconds; unset = 30 or the model's longest clip."
    )
    steps: WholeNumber
    peaks: Peaks | None = Field(None, description=PEAKS_DESCRIPTION)


def to_request(fields: ClipInput, card: ModelCard, *, request_id: str) -> GenerationRequest:
    """Return the request for `fields`. Raises RequestValidationError for a clip longer than the model allows.

    If `fields` has no length, the clip is 30 s long, or as long as the model allows if that is less.
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


def resolve_model(catalog: ModelCatalog, name: str | None, *, names: Sequence[str], default: ModelCard) -> ModelCard:
    """Return the model `name`: `default` for None and for the API's own `names`. Raises UnknownModelError."""
    if name is None or name in names:
        return default
    try:
        return catalog.resolve(name)
    except UnknownModelError as error:
        raise UnknownModelError(f"{error.message}, {', '.join(names)}", field=error.field) from error
