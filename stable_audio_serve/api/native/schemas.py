"""The wire forms of our own API: the Stable Audio 3 server's contract, with optional extensions at the end.

Static ranges only; limits that depend on settings or on the model are checked in `native.convert`.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from fastapi import UploadFile
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from stable_audio_serve.api.fields import PEAKS_DESCRIPTION, Finite, Prompt
from stable_audio_serve.audio.encode import AudioFormat
from stable_audio_serve.core.generation import EditSchedule, Keep, Priority
from stable_audio_serve.core.sound import Peaks

RESERVED_SAMPLER_KWARGS = frozenset(
    {
        "prompt",
        "negative_prompt",
        "duration",
        "steps",
        "cfg_scale",
        "batch_size",
        "seed",
        "sample_size",
        "truncate_output_to_duration",
        "conditioning",
        "conditioning_tensors",
        "negative_conditioning",
        "negative_conditioning_tensors",
        "init_audio",
        "init_noise_level",
        "inpaint_audio",
        "inpaint_mask",
        "inpaint_mask_start_seconds",
        "inpaint_mask_end_seconds",
        "duration_padding_sec",
        "apg_scale",
        "dist_shift",
        "return_latents",
        "chunked_decode",
    }
)


def check_sampler_kwargs(values: dict[str, Any]) -> dict[str, Any]:
    """Raises ValueError for reserved keys and for values that are not plain."""
    for key, value in values.items():
        if not key.strip():
            raise ValueError("sampler_kwargs keys must not be empty")
        if key in RESERVED_SAMPLER_KWARGS:
            raise ValueError(f"sampler_kwargs may not contain the reserved name {key!r}")
        if value is not None and not isinstance(value, str | int | float | bool):
            raise ValueError(f"sampler_kwargs[{key[:100]!r}] must be a string, number, boolean or null")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"sampler_kwargs[{key[:100]!r}] must be finite")
    return values


def _without_default(schema: dict[str, Any]) -> None:
    del schema["default"]  # an empty name means "not given" to us; a generated client must not send it


class Controls(BaseModel):
    """Fields of every generation request. Unknown ones are kept as extra fields, whose names the answer tells."""

    model_config = ConfigDict(extra="allow", frozen=True, protected_namespaces=())

    prompt: Prompt = Field(description="What to hear.", examples=["warm analog pad, slow attack"])
    model: str = Field(
        "",
        description="Canonical name or alias; unset = the server's default model.",
        json_schema_extra=_without_default,
    )
    negative_prompt: str | None = Field(None, description="What to avoid; takes effect with cfg_scale above 1.")
    duration: Finite = Field(7.0, gt=0, description="Length, seconds; at most the server's and the model's cap.")
    steps: int = Field(8, ge=1, description="Denoising steps; unset = the model's own default.")
    cfg_scale: Finite = Field(1.0, ge=0, le=20, description="Guidance; unset = the model's own default.")
    batch_size: int = Field(1, ge=1, description="Variations; more than one are returned as a ZIP.")
    seed: int = Field(-1, description="-1 = random. Variation i uses seed + i.")
    chunked_decode: bool | None = Field(None, description="Decode in windows; null = the model's own default.")
    apg_scale: Finite = Field(1.0, ge=0, le=10, description="Adaptive projected guidance; 0 = plain guidance.")
    duration_padding_sec: Finite = Field(
        6.0, ge=0, le=30, description="Headroom generated behind the clip, seconds; unset = the model's own default."
    )
    response_format: AudioFormat = Field(AudioFormat.WAV, description="Extension: the kind of audio file.")
    deadline_s: Finite | None = Field(None, gt=0, description="Extension: time budget, seconds; then 504.")
    priority: Priority = Field(
        "interactive", description="Extension: batch work lets interactive work go first, but not for ever."
    )
    peaks: Peaks | None = Field(None, description=PEAKS_DESCRIPTION)
    manifest: bool = Field(False, description="Extension: adds manifest.json to the ZIP of several variations.")


class GenerationBody(Controls):
    """Text to audio."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"prompt": "rain on a tin roof", "duration": 10, "seed": 42}]}
    )

    sampler_kwargs: Annotated[dict[str, Any], AfterValidator(check_sampler_kwargs)] = Field(
        default_factory=dict,
        description="Honoured: sampler_type, scale_phi, cfg_norm_threshold; by Stable Audio Open also sigma_min, "
        "sigma_max, rho. Others are ignored.",
        examples=[{"sampler_type": "euler", "scale_phi": 0.5}],
    )


class UploadForm(Controls):
    """Fields of every request with source audio."""

    audio: UploadFile = Field(description="WAV, FLAC, MP3, OGG, ...", json_schema_extra={"format": "binary"})
    sampler_kwargs: str = Field(
        "", description="A JSON object in text, see generations.", examples=['{"scale_phi": 0.5}']
    )


class VariationForm(UploadForm):
    """Audio to audio."""

    init_noise_level: Finite = Field(
        0.9, ge=0, le=1, description="Low keeps more of the source; at 1 it has no influence."
    )
    edit_schedule: EditSchedule | None = Field(
        None,
        description="Extension, flow models only: even, scaled = no step is noisier than init_noise_level, with steps "
        "even in log-SNR or those of a whole run; reference = as the original code; unset = the model's own default.",
    )


class InpaintForm(UploadForm):
    """Regenerate regions of the source and keep the rest; a region behind its end continues it."""

    inpaint_start_seconds: str | None = Field(
        None, description="Required. A number, or a list such as [2,12] or 2,12.", examples=["4", "[2,12]"]
    )
    inpaint_end_seconds: str | None = Field(None, description="Required. As many as starts.", examples=["6", "[4,15]"])
    inpaint_mask_start_seconds: str | None = Field(None, description="Alias of inpaint_start_seconds.")
    inpaint_mask_end_seconds: str | None = Field(None, description="Alias of inpaint_end_seconds.")
    keep: Keep = Field(
        "source",
        description="Extension: what is outside the regions. source = the source's own samples, with crossfades of 30 "
        "ms inside the regions, a continuation's in the last 30 ms of the source; model = what the model makes of it.",
    )


class JobControls(BaseModel):
    """A field of every job; the synchronous routes ignore it as they do unknown ones."""

    webhook_url: str | None = Field(
        None,
        min_length=1,
        max_length=2048,
        description="Extension: told the job's end, by a POST as Standard Webhooks describes it.",
        examples=["https://example.com/hooks/audio"],
    )


class JobBody(JobControls, GenerationBody):
    """Text to audio, later."""


class JobVariationForm(JobControls, VariationForm):
    """Audio to audio, later."""


class JobInpaintForm(JobControls, InpaintForm):
    """Regenerate regions of the source, later."""


class ValidationErrors(BaseModel):
    """422: one entry per field at fault."""

    class Item(BaseModel):
        """One field at fault; `loc` ends in its name."""

        type: str
        loc: list[str | int]
        msg: str
        input: Any

    detail: list[Item]


class ErrorBody(BaseModel):
    """Any other error: a sentence that names the field, where one is at fault."""

    detail: str


class ConflictBody(ErrorBody):
    """409: what the request contradicts, in a word that stays the same."""

    code: Literal["id_in_use", "idempotency_key_reused", "job_is_over"]
