"""fal's endpoints for Stable Audio 3 and 2.5: one table of their inputs, and the request that each input makes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Annotated, Any, Literal, get_args

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, ValidationError, create_model
from starlette.exceptions import HTTPException

from stable_audio_serve.api.compat.fal.wire import OWNER, SA25_APP
from stable_audio_serve.api.compat.hosted import WholeNumber, check_whole
from stable_audio_serve.api.fields import Finite, Prompt
from stable_audio_serve.api.refusals import invalid_body
from stable_audio_serve.api.service import resolve_seed
from stable_audio_serve.audio.formats import BITRATES_KBPS, available_formats
from stable_audio_serve.core.catalog import OPEN_FAMILY, ModelCard, ModelCatalog
from stable_audio_serve.core.errors import UnknownModelError
from stable_audio_serve.core.generation import MAX_PROMPT_CHARS, GenerationRequest, Lora, SourceAudio
from stable_audio_serve.core.settings import DialectSettings, FalCheckpoint
from stable_audio_serve.core.sound import PLAIN_WAV, AudioFormat, Encoding

_FORMATS = tuple(name for name in ("mp3", "wav", "flac", "ogg", "opus", "m4a", "aac") if name in available_formats())

# The fields of each operation's input, in fal's order.
_COMMON_OF_3 = "num_inference_steps guidance_scale seed enable_prompt_expansion enable_safety_checker sync_mode"
_COMMON_OF_3 += " output_format bitrate prompt"
_NAMES_OF_3 = {
    "text-to-audio": f"negative_prompt duration {_COMMON_OF_3}",
    "audio-to-audio": f"negative_prompt duration {_COMMON_OF_3} audio_url init_noise_level",
    "audio-inpainting": f"negative_prompt {_COMMON_OF_3} audio_url mask_start_seconds mask_end_seconds",
    "audio-outpainting": f"negative_prompt {_COMMON_OF_3} audio_url extend_seconds_before extend_seconds_after",
}
_NAMES_OF_25 = {
    "text-to-audio": "prompt seconds_total num_inference_steps guidance_scale sync_mode seed",
    "audio-to-audio": "prompt audio_url strength num_inference_steps total_seconds guidance_scale sync_mode seed",
    "inpaint": "prompt audio_url seconds_total guidance_scale mask_start mask_end num_inference_steps sync_mode seed",
}

_Seconds = Annotated[  # the range precedes the validator, so that the schema contains the range
    int,
    Field(ge=1, le=190, description="Length, seconds; at most the model's longest clip."),
    BeforeValidator(check_whole),
]
_Number = Annotated[Finite, Field(strict=True)]


class Adapter(BaseModel):
    """One adapter of an endpoint `.../lora`."""

    path: str = Field(min_length=1, max_length=300, description="Name of an adapter of the model.")
    scale: _Number = Field(1.0, description="Strength; 0 = off.")


@dataclass(frozen=True)
class Endpoint:
    """One endpoint. `model` is a key of `dialects.fal_models`; None: the default model of the dialects."""

    id: str
    operation: str
    model: FalCheckpoint | None = None
    longest_s: float = 190.0
    steps: int = 8
    cfg_scale: float = 1.0
    takes_adapters: bool = False

    @property
    def app(self) -> str:
        """The part of the id that the paths of queued requests have."""
        return "/".join(self.id.split("/")[:2])

    @cached_property
    def schema(self) -> type[BaseModel]:
        names = (_NAMES_OF_3 if self.model else _NAMES_OF_25)[self.operation].split()
        fields: dict[str, Any] = {name: self._fields[name] for name in names + ["loras"] * self.takes_adapters}
        name = re.sub(r"\W+", " ", self.id.removeprefix("fal-ai/")).title().replace(" ", "")
        config = ConfigDict(extra="ignore")
        return create_model(f"{name}Input", __config__=config, **fields)

    @property
    def _fields(self) -> dict[str, Any]:
        """Type and definition of every field that an endpoint may have."""
        longest_s, is_3 = self.longest_s, bool(self.model)
        whole, steps = WholeNumber, (1, 100) if is_3 else (4, 8)
        share: dict[str, Any] = {"le": 1, "description": "Noise that is mixed in: low keeps more of the source."}
        return {
            "prompt": (Prompt, Field(description="Description of the sound.")),
            "negative_prompt": (str, Field("", max_length=MAX_PROMPT_CHARS, description="What to avoid.")),
            "duration": (_Number, Field(30.0, ge=1, le=longest_s, description="Length, seconds.")),
            "seconds_total": (_Seconds if self.operation == "text-to-audio" else _Seconds | None, 190),
            "total_seconds": (_Seconds | None, None),
            "num_inference_steps": (whole, Field(self.steps, ge=steps[0], le=steps[1], description="Denoising steps.")),
            "guidance_scale": (_Number, Field(self.cfg_scale, ge=0 if is_3 else 1, le=25, description="Guidance.")),
            "seed": (whole | None, Field(None, description="Null = random.")),
            "enable_prompt_expansion": (StrictBool, Field(False, description="Must be false.")),
            "enable_safety_checker": (StrictBool, Field(True, description="Has no effect.")),
            "sync_mode": (StrictBool, Field(False, description="Return the file as a data URI.")),
            "output_format": (Literal.__getitem__(_FORMATS), Field("mp3", description="Format of the file.")),
            "bitrate": (str, Field("192k", description="8k to 320k; not used by wav and flac.")),
            "audio_url": (str, Field(min_length=1, description="Public URL, file of this server, or data URI.")),
            "init_noise_level": (_Number, Field(0.9, ge=0, **share)),
            "strength": (_Number, Field(0.8, ge=0.01, **share)),
            "mask_start": (whole, Field(30, ge=0, le=190, description="Start of the region, seconds.")),
            "mask_end": (whole, Field(190, ge=0, le=190, description="End of the region, seconds.")),
            "mask_start_seconds": (_Number, Field(ge=0, le=longest_s, description="Start of the region.")),
            "mask_end_seconds": (_Number, Field(ge=0, le=longest_s, description="End of the region.")),
            "extend_seconds_before": (_Number, Field(0.0, ge=0, le=longest_s, description="Seconds to add before.")),
            "extend_seconds_after": (_Number, Field(0.0, ge=0, le=longest_s, description="Seconds to add after.")),
            "loras": (list[Adapter], Field([], max_length=64, description="Adapters (LoRA), in this order.")),
        }

    def parse(self, body: Mapping[str, Any]) -> BaseModel:
        """Return the checked input, an instance of `schema`. Raises RequestValidationError."""
        try:
            return self.schema.model_validate(body)
        except ValidationError as error:
            raise invalid_body(error) from error

    def choose_model(self, catalog: ModelCatalog, settings: DialectSettings) -> ModelCard:
        """Return the model that answers. Raises HTTPException 404 if it is not served."""
        if not self.model:
            return catalog.choose(settings.model, family=OPEN_FAMILY)
        name = settings.fal_models.get(self.model) or "-".join(self.model.split("/")[1:])
        try:
            return catalog.resolve(name)
        except UnknownModelError as error:
            served = ", ".join(card.name for card in catalog)
            raise HTTPException(404, f"{self.id}: the model {name} is not served; served: {served}") from error


def _table() -> dict[str, Endpoint]:
    found = [Endpoint(f"{SA25_APP}/{operation}", operation) for operation in _NAMES_OF_25]
    for checkpoint, operation in product(get_args(FalCheckpoint), _NAMES_OF_3):
        is_base = checkpoint.endswith("/base")
        endpoint = Endpoint(
            f"{OWNER}/{checkpoint}/{operation}",
            operation,
            model=checkpoint,
            longest_s=380.0 if "/medium" in checkpoint else 120.0,
            steps=50 if is_base else 8,
            cfg_scale=7.0 if is_base else 1.0,
        )
        found += [endpoint, replace(endpoint, id=f"{endpoint.id}/lora", takes_adapters=True)]
    return {endpoint.id: endpoint for endpoint in found}


ENDPOINTS: Mapping[str, Endpoint] = _table()


def to_encoding(given: BaseModel) -> Encoding:
    """Return how the file is encoded. Raises RequestValidationError."""
    values = dict(given)
    file_format = AudioFormat(values.get("output_format", "wav"))
    if file_format in (AudioFormat.WAV, AudioFormat.FLAC):
        return replace(PLAIN_WAV, file_format=file_format)
    text, (low, high) = values["bitrate"], BITRATES_KBPS
    kbps = int(found[1]) if (found := re.fullmatch(r"([0-9]{1,3})k", text)) else 0
    if not low <= kbps <= high:
        raise _fault("bitrate", f"Input should be from '{low}k' to '{high}k'", value=text)
    return Encoding(file_format, bitrate_kbps=kbps)


def to_request(
    endpoint: Endpoint, given: BaseModel, *, card: ModelCard, source: SourceAudio | None, request_id: str
) -> GenerationRequest:
    """Return the request, with its source audio. Raises RequestValidationError."""
    values = dict(given)
    if values.get("enable_prompt_expansion"):
        raise _fault("enable_prompt_expansion", "true is not supported by this server", value=True)
    duration_s = _duration_s(endpoint, given, card=card, source=source)
    request = GenerationRequest(
        prompt=values["prompt"],
        duration_s=duration_s,
        seed=resolve_seed(-1 if values["seed"] is None else values["seed"]),
        negative_prompt=values.get("negative_prompt") or None,
        steps=values["num_inference_steps"],
        cfg_scale=values["guidance_scale"],
        loras=tuple(Lora(one.path, one.scale) for one in values.get("loras", ())),
        request_id=request_id,
    )
    match endpoint.operation:
        case "audio-to-audio":
            share = values["init_noise_level" if endpoint.model else "strength"]
            return replace(request, init_audio=source, init_noise_level=card.noise_level(share, sampler=None))
        case "audio-inpainting" | "inpaint":
            start, end = (f"mask_{name}{'_seconds' if endpoint.model else ''}" for name in ("start", "end"))
            region = values[start], min(values[end], duration_s)
            if region[0] >= region[1]:
                message = f"Input should be less than {end} and than the length of the clip, {duration_s:g}"
                raise _fault(start, message, value=values[start])
            return replace(request, inpaint_audio=source, inpaint_regions_s=(region,))
        case "audio-outpainting":
            before_s, after_s = values["extend_seconds_before"], values["extend_seconds_after"]
            added = (0.0, before_s), (duration_s - after_s, duration_s)
            regions = tuple(region for region in added if region[0] < region[1])
            return replace(request, inpaint_audio=source, source_start_s=before_s, inpaint_regions_s=regions)
    return request


def _duration_s(endpoint: Endpoint, given: BaseModel, *, card: ModelCard, source: SourceAudio | None) -> float:
    """Return the length of the clip. Lengths that the client did not send shrink to the model's longest clip.

    Raises RequestValidationError if the client sent a length greater than `longest_s`.
    """
    longest_s = min(endpoint.longest_s, card.max_duration_s)
    name, length_s = _length(endpoint, given, source_s=source.duration_s if source else 0.0)
    if length_s > longest_s and name in given.model_fields_set:
        message = f"The clip should have at most {longest_s:g} seconds, the longest clip of the model {card.name}"
        raise _fault(name, message, value=getattr(given, name), le=longest_s)
    return float(min(length_s, longest_s))


def _length(endpoint: Endpoint, given: BaseModel, *, source_s: float) -> tuple[str, float]:
    """Return the field that sets the length of the clip, "" = none, and the length, seconds."""
    values = dict(given)
    if endpoint.operation == "audio-outpainting":
        before_s, after_s = values["extend_seconds_before"], values["extend_seconds_after"]
        name, length_s = f"extend_seconds_{'before' if before_s > after_s else 'after'}", before_s + source_s + after_s
        if length_s == source_s:
            raise _fault(name, "Input should be above 0, or the other extension should be", value=after_s)
        return name, length_s
    name = next((name for name in ("duration", "seconds_total", "total_seconds") if name in values), "")
    return ("", source_s) if values.get(name) is None else (name, values[name])


def _fault(name: str, message: str, *, value: object, **context: object) -> RequestValidationError:
    entry = {"type": "value_error", "loc": ("body", name), "msg": message, "input": value}
    return RequestValidationError([entry | ({"ctx": context} if context else {})])
