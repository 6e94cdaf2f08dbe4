"""Request and error models of vLLM-Omni's audio generation, release 0.30.0."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema

from stable_audio_serve.api.fields import PEAKS_DESCRIPTION, Finite, Prompt
from stable_audio_serve.core.generation import MAX_PROMPT_CHARS
from stable_audio_serve.core.sound import Peaks


class ResponseFormat(StrEnum):
    """`pcm` is raw samples, signed 16-bit little-endian, interleaved. `opus` is Opus in Ogg at 48 kHz."""

    WAV = "wav"
    PCM = "pcm"
    FLAC = "flac"
    MP3 = "mp3"
    OPUS = "opus"


def _check_seed(seed: int) -> int:
    if not -(2**63) <= seed < 2**63:
        raise ValueError("must fit into 64 bits, -2**63 to 2**63 - 1")
    return seed


# The range is checked here, because as a bound in the schema 2**63 - 1 would be rounded to the float 2**63.
Seed = Annotated[int, AfterValidator(_check_seed), WithJsonSchema({"type": "integer", "format": "int64"})]


class AudioBody(BaseModel):
    """One clip from a text prompt. Null means unset."""

    model_config = ConfigDict(
        extra="ignore",
        frozen=True,
        protected_namespaces=(),
        json_schema_extra={
            "examples": [
                {
                    "input": "a dog barking in the distance",
                    "audio_length": 10.0,
                    "negative_prompt": "Low quality",
                    "guidance_scale": 7.0,
                    "num_inference_steps": 100,
                    "seed": 42,
                }
            ]
        },
    )

    input: Prompt = Field(description="Description of the sound.")
    model: str | None = Field(None, description="Name or alias of a served model; null = the default.")
    response_format: ResponseFormat = Field(ResponseFormat.WAV, description="Format of the audio file.")
    speed: Finite | None = Field(None, ge=0.25, le=4.0, description="Changes the length, keeps the pitch; null = 1.")
    stream_format: Literal["audio", "sse"] | None = Field(None, description="Only audio is supported.")
    audio_length: Finite | None = Field(
        None, gt=0, description="Length, seconds, up to the model's longest clip; null = 47.55 or the longest clip."
    )
    audio_start: Finite | None = Field(
        None, description="Start of the clip within a longer piece, 0 to 512 seconds; only used with audio_length."
    )
    negative_prompt: str | None = Field(
        None, max_length=MAX_PROMPT_CHARS, description="Sounds to avoid; needs guidance above 1."
    )
    guidance_scale: Finite | None = Field(None, ge=0, le=1000, description="Guidance; on above 1; null = 7.")
    num_inference_steps: int | None = Field(None, ge=1, le=1000, description="Denoising steps; null = 50.")
    seed: Seed | None = Field(None, description="Equal seeds and requests give equal bytes; null = random.")
    peaks: Peaks | None = Field(None, description=PEAKS_DESCRIPTION)


class ErrorBody(BaseModel):
    """Any error, in OpenAI's format."""

    class Error(BaseModel):
        """`code` is the HTTP status, `param` the invalid field."""

        message: str
        type: str
        param: str | None
        code: int

    error: Error
