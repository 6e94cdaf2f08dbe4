"""Request and error models of the native API: the fields of the Stable Audio 3 server, then our extensions.

The models check fixed ranges only. `native.convert` checks limits that depend on settings or on the model.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from fastapi import UploadFile
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from stable_audio_serve.api.fields import (
    PEAKS_DESCRIPTION,
    Bitrate,
    Finite,
    Prompt,
    ResponseFormat,
    SampleBits,
    SampleRate,
)
from stable_audio_serve.audio.recipe import MOST_SECTIONS
from stable_audio_serve.core.generation import MAX_PROMPT_CHARS, EditSchedule, Keep, Priority, Stacking
from stable_audio_serve.core.sound import AudioFormat, Peaks

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
    """Return `values`. Raises ValueError for reserved keys and for values other than strings, numbers and booleans."""
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


MAX_VARIATIONS = 99  # the highest value of the setting `max_batch_size`
MAX_LORAS = 64  # the highest value of the setting `max_loras`

_Time = Annotated[Finite, Field(ge=0, le=1)]


class LoraBody(BaseModel):
    """One adapter of a request."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1, max_length=100, description="Name of an adapter of the model.")
    strength: Finite = Field(
        1.0, ge=-2, le=2, description="Strength: 0 = off. Must not be negative for adapters of the DoRA types."
    )
    interval: Annotated[list[_Time], Field(min_length=2, max_length=2)] | None = Field(
        None,
        description="Denoising times in which the adapter is used, from 0 (end) to 1 (start, noise); unset = [0, 1].",
    )

    @field_validator("interval")
    @classmethod
    def _check_order(cls, interval: list[float] | None) -> list[float] | None:
        if interval and interval[0] > interval[1]:
            raise ValueError("the first number must not be above the second")
        return interval


class LoudnessBody(BaseModel):
    """The loudness that a clip gets."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    target_lufs: Finite = Field(ge=-70, le=-5, description="Integrated loudness (ITU-R BS.1770), LUFS.")
    true_peak_dbtp: Finite = Field(-1.0, ge=-9, le=0, description="Highest true peak, dBTP. A limiter enforces it.")


def _without_default(schema: dict[str, Any]) -> None:
    del schema["default"]  # the default "" means unset, and generated clients should not send it


class Controls(BaseModel):
    """Fields of every generation request. Unknown fields are kept, so that the response can list them."""

    model_config = ConfigDict(extra="allow", frozen=True)

    prompt: Prompt = Field(
        description="Description of the sound. Not required with `prompts`.", examples=["warm analog pad, slow attack"]
    )
    model: str = Field(
        "",
        description="Canonical name or alias, with adapters as in `medium:vinyl+bells`; unset = the default model.",
        json_schema_extra=_without_default,
    )
    negative_prompt: str | None = Field(
        None, max_length=MAX_PROMPT_CHARS, description="Sounds to avoid; needs cfg_scale above 1."
    )
    duration: Finite = Field(7.0, gt=0, description="Length, seconds, within the limits of server and model.")
    steps: int = Field(8, ge=1, description="Denoising steps; unset = the model's default.")
    cfg_scale: Finite = Field(1.0, ge=0, le=20, description="Guidance; unset = the model's default.")
    batch_size: int = Field(1, ge=1, description="Number of variations; several are returned as a ZIP.")
    seed: int = Field(-1, description="-1 = random. Seeds count up: variation i uses seed + i.")
    chunked_decode: bool | None = Field(None, description="Decode in windows; null = the model's default.")
    apg_scale: Finite = Field(1.0, ge=0, le=10, description="Adaptive projected guidance; 0 = plain guidance.")
    duration_padding_sec: Finite = Field(
        6.0, ge=0, le=30, description="Audio generated past the end and cut off, seconds; unset = the model's default."
    )
    response_format: ResponseFormat = Field(
        AudioFormat.WAV,
        description="Extension: format of the audio file. pcm (16-bit little-endian), ulaw and alaw (mono, 8000 Hz) "
        "have no header.",
    )
    bitrate: Bitrate | None = Field(
        None,
        description="Extension: bit rate of a lossy format in kbit/s, as 192 or '192k'; unset = the format's default.",
    )
    bit_depth: SampleBits | None = Field(
        None, description="Extension: bits per sample: 16, 24 or float for wav, 16 or 24 for flac; unset = 16."
    )
    sample_rate: SampleRate | None = Field(
        None,
        description="Extension: sample rate of the file, hertz; unset = the model's rate, or the nearest one that the "
        "format allows.",
    )
    deadline_s: Finite | None = Field(
        None, gt=0, description="Extension: time limit, seconds. If it is exceeded, the answer is 504."
    )
    priority: Priority = Field(
        "interactive", description="Extension: interactive work runs before batch work, which keeps a minimum share."
    )
    lora_stacking: Stacking | None = Field(
        None, description="Extension: how several adapters combine; unset = the model's default."
    )
    peaks: Peaks | None = Field(None, description=PEAKS_DESCRIPTION)
    fade_in_s: Finite | None = Field(None, ge=0, description="Extension: linear fade at the start, seconds.")
    fade_out_s: Finite | None = Field(None, ge=0, description="Extension: linear fade at the end, seconds.")
    manifest: bool = Field(False, description="Extension: add manifest.json to the ZIP of several variations.")

    @model_validator(mode="before")
    @classmethod
    def _fill_prompt(cls, values: Any) -> Any:
        """Set a missing `prompt` to a placeholder if there are `prompts`, which replace `prompt`."""
        if not isinstance(values, dict) or values.get("prompt") not in (None, ""):
            return values
        prompts = values.get("prompts")
        is_unset = prompts.strip() in {"", "null"} if isinstance(prompts, str) else prompts is None
        return values if is_unset else {**values, "prompt": "-"}


class GenerationBody(Controls):
    """Text to audio."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"prompt": "rain on a tin roof", "duration": 10, "seed": 42}]}
    )

    sampler_kwargs: Annotated[dict[str, Any], AfterValidator(check_sampler_kwargs)] = Field(
        default_factory=dict,
        description="Used: sampler_type, scale_phi, cfg_norm_threshold; by Stable Audio Open also sigma_min, "
        "sigma_max, rho. Others are ignored.",
        examples=[{"sampler_type": "euler", "scale_phi": 0.5}],
    )
    prompts: list[Prompt] | None = Field(
        None,
        min_length=1,
        max_length=MAX_VARIATIONS,
        description="Extension: a prompt for each variation, in place of `prompt`; `batch_size` follows from it.",
    )
    seeds: list[int] | None = Field(
        None,
        min_length=1,
        max_length=MAX_VARIATIONS,
        description="Extension: a seed for each variation, in place of `seed`; -1 = random.",
    )
    loras: list[LoraBody] | None = Field(
        None,
        max_length=MAX_LORAS,
        description="Extension: adapters (LoRA) of the model, in this order; GET /v1/models lists them.",
    )
    loudness: LoudnessBody | None = Field(
        None, description="Extension: target loudness of the clip, which must last at least 0.4 s."
    )
    loop: bool | None = Field(None, description="Extension: make a clip that repeats without a seam.")
    bpm: Finite | None = Field(
        None,
        ge=1,
        le=1000,
        description="Extension: tempo of a loop, beats per minute. Name it in the prompt too.",
    )
    bars: int | None = Field(
        None,
        ge=1,
        le=1000,
        description="Extension: length of a loop in bars of four beats, with bpm; replaces duration.",
    )


class UploadForm(Controls):
    """Fields of every request with source audio."""

    audio: UploadFile = Field(
        description="Audio file: WAV, FLAC, MP3, OGG, ...", json_schema_extra={"format": "binary"}
    )
    sampler_kwargs: str = Field(
        "", description="A JSON object as text, as in generations.", examples=['{"scale_phi": 0.5}']
    )
    loras: str = Field(
        "", description="Extension: a JSON list as text, as in generations.", examples=['[{"name": "vinyl"}]']
    )
    prompts: str = Field("", description="Extension: a JSON list as text, as in generations.", examples=['["a", "b"]'])
    seeds: str = Field("", description="Extension: a JSON list as text, as in generations.", examples=["[7, 11]"])
    loudness: str = Field(
        "", description="Extension: a JSON object as text, as in generations.", examples=['{"target_lufs": -14}']
    )

    @field_validator("negative_prompt")
    @classmethod
    def _drop_blank(cls, text: str | None) -> str | None:
        return text if text and text.strip() else None  # an empty input of an HTML form, as in the original


Fields = GenerationBody | UploadForm  # the fields of any request; a form sends lists and objects as JSON text


class VariationForm(UploadForm):
    """Audio to audio."""

    init_noise_level: Finite = Field(
        0.9, ge=0, le=1, description="Strength: low keeps more of the source; at 1 the source has no influence."
    )
    edit_schedule: EditSchedule | None = Field(
        None,
        description="Extension, flow models only: even or scaled = no step is noisier than init_noise_level, with "
        "steps even in log-SNR or the scaled steps of a full run; reference = as the original code; unset = the "
        "model's default.",
    )


class InpaintForm(UploadForm):
    """Regenerate regions of the source, or extend it, and keep the rest.

    A region that ends after the source extends the clip.
    """

    inpaint_start_seconds: str | None = Field(
        None,
        description="Starts of the regions, seconds: a number, or a list as [2,12] or 2,12. Required unless "
        "`extend_before_s` or `extend_after_s` is set. Times count from the start of the uploaded source.",
        examples=["4", "[2,12]"],
    )
    inpaint_end_seconds: str | None = Field(
        None, description="Ends of the regions, seconds; as many as starts.", examples=["6", "[4,15]"]
    )
    inpaint_mask_start_seconds: str | None = Field(None, description="Alias of inpaint_start_seconds.")
    inpaint_mask_end_seconds: str | None = Field(None, description="Alias of inpaint_end_seconds.")
    extend_before_s: Finite | None = Field(None, ge=0, description="Extension: new audio before the source, seconds.")
    extend_after_s: Finite | None = Field(
        None,
        ge=0,
        description="Extension: new audio after the source, seconds. `duration` follows from it and must be unset.",
    )
    init_noise_level: Finite | None = Field(
        None,
        ge=0,
        le=1,
        description="Extension: strength; regions start from the source, low keeps more of it. Unset = 1, from noise.",
    )
    keep: Keep = Field(
        "source",
        description="Extension: audio outside the regions. source = the source's own samples, with crossfades of 30 "
        "ms inside the regions (to extend: in the last 30 ms of the source); model = the model's output.",
    )


class JobControls(BaseModel):
    """The field that only jobs have. Synchronous routes ignore it, as they ignore unknown fields."""

    webhook_url: str | None = Field(
        None,
        min_length=1,
        max_length=2048,
        description="Extension: URL called when the job ends, by POST as in Standard Webhooks.",
        examples=["https://example.com/hooks/audio"],
    )


class SectionBody(BaseModel):
    """One section of a long piece."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: Prompt | None = Field(None, description="Description of the sound; unset = the prompt of the job.")
    duration: Finite = Field(gt=0, description="Length, seconds; with `overlap_s` at most the model's maximum.")


class JobBody(JobControls, GenerationBody):
    """Text to audio, as a job."""

    sections: list[SectionBody] | None = Field(
        None,
        max_length=MOST_SECTIONS,
        description="Extension: sections of a piece that may be longer than the model's maximum, one after the other. "
        "`duration` is then the sum of their durations.",
        examples=[[{"duration": 30}, {"prompt": "the rain stops", "duration": 20}]],
    )
    overlap_s: Finite | None = Field(
        None,
        gt=0,
        description="Extension, with sections: how much audio each section continues, seconds; at most half the "
        "model's maximum; unset = 12, or that half if it is less.",
    )


class JobVariationForm(JobControls, VariationForm):
    """Audio to audio, as a job."""


class JobInpaintForm(JobControls, InpaintForm):
    """Regenerate regions of the source, as a job."""


class ValidationErrors(BaseModel):
    """422: one entry per invalid field."""

    class Item(BaseModel):
        """One invalid field; `loc` ends in its name."""

        type: str
        loc: list[str | int]
        msg: str
        input: Any

    detail: list[Item]


class ErrorBody(BaseModel):
    """Any other error: a sentence that names the invalid field, if any."""

    detail: str


class ConflictBody(ErrorBody):
    """409: a sentence about the conflict, and a code that does not change between versions."""

    code: Literal["id_in_use", "idempotency_key_reused", "job_is_over"]
