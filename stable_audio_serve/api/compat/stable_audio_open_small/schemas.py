"""Request models of the dialect, and the error message for each invalid field.

The JSON body of `/generate` is strictly typed. The other bodies may be forms, in which every value is text, so their
fields also accept numbers as text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from fastapi import UploadFile
from fastapi.exceptions import RequestValidationError
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    WithJsonSchema,
)
from pydantic_core import PydanticCustomError

from stable_audio_serve.api.fields import NOT_BLANK
from stable_audio_serve.audio.loops import BAR_COUNTS, read_tempo
from stable_audio_serve.core.generation import MAX_PROMPT_CHARS

_RULE = "rule"  # type of the errors raised in this file, whose messages are sent to clients unchanged
_WHOLE_SECONDS = {
    "anyOf": [
        {"type": "number", "minimum": 1},
        {"type": "string", "pattern": "^[1-9][0-9]{0,3}$"},
        {"type": "null"},
    ]
}


def _check_tempo(prompt: str) -> str:
    if read_tempo(prompt) is None:
        raise PydanticCustomError(_RULE, "BPM must be specified in prompt (e.g., '120bpm')")
    return prompt


def _to_whole_seconds(value: Any) -> Any:
    """Convert a value with int(), as the original server does."""
    try:
        return None if value is None else int(value)
    except (TypeError, ValueError, OverflowError):
        raise PydanticCustomError(_RULE, "seconds_total must be an integer number of seconds") from None


def _to_bars(value: Any) -> Any:
    return None if isinstance(value, str) and value.strip().casefold() in ("", "auto") else value


def _check_bars(bars: int) -> int:
    if bars not in BAR_COUNTS:
        raise ValueError
    return bars


def _to_loop_type(value: Any) -> Any:
    return value if value in ("drums", "instruments") else "auto"


Text = Annotated[
    str, StringConstraints(strip_whitespace=True, min_length=1), Field(json_schema_extra={"pattern": NOT_BLANK})
]
Prompt = Annotated[Text, Field(max_length=MAX_PROMPT_CHARS)]
LoopPrompt = Annotated[
    Prompt, AfterValidator(_check_tempo), Field(description="Must name a tempo: digits, then bpm.", examples=["120bpm"])
]
LoopType = Annotated[
    Literal["drums", "instruments", "auto"],
    BeforeValidator(_to_loop_type),
    WithJsonSchema({"description": "drums, instruments or auto; anything else is auto."}),
]
Bars = Annotated[
    Annotated[int, AfterValidator(_check_bars)] | None,
    BeforeValidator(_to_bars),
    WithJsonSchema({"anyOf": [{"enum": [*BAR_COUNTS, "auto", ""]}, {"type": "null"}]}),
]
Scale = Annotated[float, Field(ge=0, le=20, allow_inf_nan=False)]
Strength = Annotated[float, Field(ge=0.1, le=1, allow_inf_nan=False)]
Format = Literal["file", "base64"]
ModelType = Annotated[
    Literal["standard", "finetune"],
    BeforeValidator(lambda value: "standard" if value is None else value),
    WithJsonSchema({"anyOf": [{"enum": ["standard", "finetune"]}, {"type": "null"}]}),
]


class Wire(BaseModel):
    """Base of all request models. `rules` has the dialect's message for each field that may be invalid."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    rules: ClassVar[Mapping[str, str]] = {
        "prompt": "must be a string of at most 100000 characters",
        "negative_prompt": "must be a string",
        "steps": "must be integer between 1-250",
        "cfg_scale": "must be number between 0-20",
        "seed": "must be integer, -1 for random",
        "return_format": "must be 'file' or 'base64'",
        "seconds_total": "must be >= 1",
        "seconds_start": "must be number >= 0",
        "sampler_type": "must be the name of a sampler",
        "model_type": "must be 'standard' or 'finetune'",
        "finetune_repo": "must be a string",
        "finetune_checkpoint": "must be a string",
        "bars": "must be 1, 2, 4, or 8",
        "style_strength": "must be between 0.1-1.0",
        "audio_file": "must be an uploaded file",
        "key": "must be a string",
    }


class GenerateBody(Wire):
    """Text to audio. The clip has the model's full length unless `seconds_total` is shorter."""

    prompt: Prompt
    steps: Annotated[int, Field(strict=True, ge=1, le=250)] | None = Field(
        None, description="Unset = the model's default."
    )
    cfg_scale: Annotated[Scale, Field(strict=True)] = 1.0
    negative_prompt: str | None = None
    seed: Annotated[int, Field(strict=True)] = Field(-1, description="-1 = random.")
    return_format: Format = "file"
    seconds_total: Annotated[
        Annotated[int, Field(ge=1)] | None, BeforeValidator(_to_whole_seconds), WithJsonSchema(_WHOLE_SECONDS)
    ] = Field(None, description="A number or text; limited to the model's longest clip.")
    seconds_start: Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)] | None = Field(
        None, description="Used by models conditioned on it."
    )
    sampler_type: str | None = None
    model_type: ModelType = "standard"
    finetune_repo: str | None = Field(None, description="With model_type finetune: a served model's name or alias.")
    finetune_checkpoint: str | None = None


class LoopForm(Wire):
    """A loop, from text or in the style of an upload."""

    prompt: LoopPrompt
    loop_type: LoopType = "auto"
    bars: Bars = Field(None, description="1, 2, 4 or 8; empty, unset or auto = as many as fit.")
    style_strength: Strength = 0.8
    steps: Annotated[int, Field(ge=1, le=250)] | None = None
    cfg_scale: Scale = 6.0
    seed: int = -1
    return_format: Format = "file"
    audio_file: UploadFile | None = Field(None, json_schema_extra={"format": "binary"})
    model_type: ModelType = "standard"
    finetune_repo: str | None = None
    finetune_checkpoint: str | None = None


class StyleForm(Wire):
    """A clip in the style of the prompt, made from an upload."""

    rules: ClassVar[Mapping[str, str]] = {**Wire.rules, "steps": "must be integer between 1-100"}

    audio_file: UploadFile = Field(json_schema_extra={"format": "binary"})
    prompt: Prompt
    negative_prompt: str | None = None
    style_strength: Strength = 0.8
    steps: Annotated[int, Field(ge=1, le=100)] | None = None
    cfg_scale: Scale = 6.0
    seed: int = -1
    return_format: Format = "file"


class RiffForm(Wire):
    """A loop from a riff of the operator's library."""

    prompt: LoopPrompt
    key: Text = Field(description="Musical key, any case.", examples=["gsharp"])
    loop_type: LoopType = "instruments"
    bars: Bars = None
    style_strength: Strength = 0.8
    steps: Annotated[int, Field(ge=1, le=250)] | None = None
    cfg_scale: Scale = 1.0
    seed: int = -1
    return_format: Format = "file"


W = TypeVar("W", bound=Wire)


def parse(form: type[W], values: Mapping[str, Any]) -> W:
    """Return `values` as an instance of `form`. Raises RequestValidationError with this dialect's messages."""
    try:
        return form.model_validate(values)
    except ValidationError as error:
        raise RequestValidationError(
            [
                {
                    "type": fault["type"],
                    "loc": ("body", fault["loc"][0]),
                    "msg": _sentence(form, str(fault["loc"][0]), kind=fault["type"], message=fault["msg"]),
                    "input": fault["input"],
                }
                for fault in error.errors(include_url=False)
            ]
        ) from error


def _sentence(form: type[Wire], field: str, *, kind: str, message: str) -> str:
    if kind == _RULE:
        return message
    if kind in ("missing", "string_too_short"):
        return f"{field} is required" + (" (e.g., 'gsharp', 'f', 'csharp')" if field == "key" else "")
    return f"{field} {form.rules[field]}"
