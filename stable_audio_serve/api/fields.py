"""Field types shared by the request models of several dialects."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import Annotated

from pydantic import BeforeValidator, Field, StringConstraints, WithJsonSchema
from pydantic_core import PydanticCustomError

from stable_audio_serve.audio.formats import BITRATES_KBPS, SAMPLE_RATES_HZ, available_formats, require_format
from stable_audio_serve.core.errors import InvalidRequestError
from stable_audio_serve.core.generation import MAX_PROMPT_CHARS
from stable_audio_serve.core.sound import AudioFormat, BitDepth

NOT_BLANK = r"\S"
IS_NONE: Callable[[object], bool] = partial(operator.is_, None)  # for `exclude_if`

PEAKS_DESCRIPTION = (
    "Extension: limit = a limiter holds peaks at 0.977 and leaves quieter clips unchanged; "
    "scale = divide by the clip's own peak; clip = cut off at full scale. Null = the server's default."
)
Finite = Annotated[float, Field(allow_inf_nan=False)]
Prompt = Annotated[
    str,
    StringConstraints(strip_whitespace=True, min_length=1, max_length=MAX_PROMPT_CHARS),
    Field(json_schema_extra={"pattern": NOT_BLANK}),
]


def _to_format(value: object) -> object:
    try:
        return require_format(str(value))
    except InvalidRequestError as error:
        raise PydanticCustomError("enum", "{message}", {"message": error.message}) from error


def _to_kbps(value: object) -> object:
    """Remove the unit from a bit rate such as "192k". fal's API and ffmpeg write bit rates in this form."""
    return value[:-1] if isinstance(value, str) and value[:-1].isdecimal() and value[-1] in "kK" else value


def _to_whole(value: object) -> object:
    """Convert the text of a form field to a number, because `Literal` only accepts numbers."""
    return int(value) if isinstance(value, str) and value.isascii() and value.isdigit() else value


ResponseFormat = Annotated[
    AudioFormat,
    BeforeValidator(_to_format),
    WithJsonSchema({"type": "string", "enum": [str(name) for name in available_formats()]}),
]
Bitrate = Annotated[int, Field(ge=BITRATES_KBPS[0], le=BITRATES_KBPS[1]), BeforeValidator(_to_kbps)]
SampleBits = Annotated[BitDepth, BeforeValidator(_to_whole)]
SampleRate = Annotated[int, Field(json_schema_extra={"enum": list(SAMPLE_RATES_HZ)})]
