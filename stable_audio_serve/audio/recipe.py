"""A clip's recipe: all values that determine the bytes of one audio file. Equal requests have equal recipes.

Recipes from clients are untrusted input. This module checks their fields and types. `api.native.replay` checks their
values against the limits of the server and its models.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

from stable_audio_serve.audio.formats import available_formats
from stable_audio_serve.core.generation import (
    MAX_PROMPT_CHARS,
    SEED_LIMIT,
    EditSchedule,
    GenerationRequest,
    Keep,
    LoopStart,
    Lora,
    MadeOn,
    Mode,
    Role,
    Section,
    SourceAudio,
    Stacking,
)
from stable_audio_serve.core.sound import AS_IS, PLAIN_WAV, AudioFormat, BitDepth, Encoding, Finishing, Loudness, Peaks

MOST_BYTES = 1_048_576  # size of the longest recipe as text
MOST_REGIONS = 102  # 100 regions of the client, and two that extend the source before its start and after its end
MOST_SECTIONS = 1000
_LONG = ("prompt", "negative_prompt", "inpaint_regions", "sections")


def _to_int(value: object) -> object:
    """Convert a whole number like 8.0 to an int, because JSON does not distinguish 8.0 and 8."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


_WHOLE = BeforeValidator(_to_int)
_FORMATS = WithJsonSchema({"type": "string", "enum": [str(name) for name in available_formats()]})
_Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_ShortText = Annotated[str, Field(min_length=1, max_length=200)]
_Seconds = Annotated[float, Field(ge=0, le=1e6)]  # seconds
_Region = tuple[_Seconds, _Seconds]  # start, end
_Time = Annotated[float, Field(ge=0, le=1)]  # time of denoising, which starts from noise at 1
_Start = Annotated[float, Field(ge=0, allow_inf_nan=False)]  # seconds; models clamp it to their own range


def _unset(description: str | None = None) -> Any:
    """Return an optional field that is left out of the JSON if it is unset."""
    return Field(None, description=description, exclude_if=lambda value: value is None)


class _Part(BaseModel):
    """Base of the Pydantic models in a recipe. Refuses unknown keys, values of another type and non-finite numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, title=None)


class RecipeSource(_Part):
    """Source audio of a clip."""

    sha256: _Sha256 = Field(description="Hash of the uploaded file.")
    is_mixed: Literal[True] | None = _unset("Whether its channels were mixed to mono.")


class RecipeLora(_Part):
    """One adapter of a clip."""

    name: _ShortText
    strength: Annotated[float, Field(ge=-2, le=2)]
    interval: Annotated[tuple[_Time, _Time], Field(strict=False)] | None = _unset("Denoising times; unset = all.")
    sha256: _Sha256 | None = _unset("Hash of the adapter's file.")
    has_conditioners: Literal[True] | None = _unset("Whether it also changed the embedding of the duration.")

    @classmethod
    def of(cls, lora: Lora) -> RecipeLora:
        """Convert an adapter of a request to its entry in a recipe."""
        low, high = lora.interval
        return cls(
            name=lora.name,
            strength=float(lora.strength),
            interval=None if (low, high) == (0, 1) else (float(low), float(high)),
            sha256=lora.sha256 or None,
            has_conditioners=lora.has_conditioners or None,
        )

    def to_lora(self) -> Lora:
        """Return the adapter of the request that recreates the clip."""
        return Lora(
            self.name,
            self.strength,
            self.interval or (0.0, 1.0),
            sha256=self.sha256 or "",
            has_conditioners=self.has_conditioners or False,
        )


class RecipeLoudness(_Part):
    """Target loudness of a clip."""

    target_lufs: Annotated[float, Field(ge=-70, le=-5)]
    true_peak_dbtp: Annotated[float, Field(ge=-9, le=0)]

    @classmethod
    def of(cls, loudness: Loudness) -> RecipeLoudness:
        """Convert a target loudness to its entry in a recipe."""
        return cls(target_lufs=float(loudness.target_lufs), true_peak_dbtp=float(loudness.true_peak_dbtp))


class RecipeMaker(_Part):
    """The software and hardware that made the clip. They affect its exact samples. Unknown values are left out."""

    version: _ShortText | None = _unset("Version of stable-audio-serve.")
    torch: _ShortText | None = _unset("Version of PyTorch.")
    transformers: _ShortText | None = _unset("Version of Transformers, which reads the prompt.")
    device: _ShortText = Field(description="cuda, mps or cpu.")
    processor: _ShortText | None = _unset("Instruction sets of the CPU, such as AVX512, or the name of the GPU.")
    dtype: _ShortText = Field(description="Precision of the denoiser: float32, float16 or bfloat16.")
    decode_precision: _ShortText | None = _unset("Precision of the decoder.")
    networks: _ShortText | None = _unset("Network implementation: native or stable_audio_tools.")
    mode: Mode | None = _unset("strict = the bytes do not depend on other requests; fast = they may.")
    threads: Annotated[int, Field(ge=1, le=4096), _WHOLE] | None = _unset(
        "CPU threads of a call; only on a CPU, and there only in fast mode or if the bytes may depend on it."
    )
    slots: Annotated[int, Field(ge=1, le=4096), _WHOLE] | None = _unset("Rows of a call; only in strict mode on a GPU.")
    is_compiled: bool | None = _unset("Whether the networks were compiled with torch.compile.")
    profile: _ShortText | None = _unset("Speed features of the engine, only on a GPU: plain or accelerated.")
    attention: _ShortText | None = _unset("Kernels of attention, only on a GPU: without and with a mask.")
    has_fused_kernels: bool | None = _unset("Whether the networks used fused kernels, only on a GPU.")
    codecs: _ShortText | None = _unset(
        "Libraries that read the sources and wrote the file; unset for WAV and PCM without sources and sample_rate."
    )


class RecipeSection(_Part):
    """One section of a long piece."""

    prompt: Annotated[str, Field(max_length=MAX_PROMPT_CHARS)] | None = _unset("Unset = the prompt of the whole.")
    duration: Annotated[float, Field(gt=0, le=1e6)] = Field(description="Seconds.")
    checkpoint: _Sha256 | None = _unset("Hash of config, weights and text encoder; unset = that of the whole.")
    made_on: RecipeMaker | None = _unset("Software and hardware; unset = those of the whole.")


class Recipe(_Part):
    """The recipe of one audio file. Fields have the names of the native API."""

    recipe: Annotated[Literal[1], _WHOLE] = Field(description="Version of the recipe format.")
    model: _ShortText
    checkpoint: _Sha256 | None = _unset("Hash of config, weights and text encoder.")
    prompt: Annotated[str, Field(max_length=MAX_PROMPT_CHARS)]
    negative_prompt: str | None = _unset()
    duration: Annotated[float, Field(gt=0, le=1e6)] = Field(description="Seconds.")
    seed: Annotated[int, Field(ge=0, lt=SEED_LIMIT), _WHOLE]
    steps: Annotated[int, Field(ge=1, le=1000), _WHOLE] | None = _unset()
    cfg_scale: Annotated[float, Field(ge=0, le=1000)] | None = _unset()
    sampler: _ShortText | None = _unset()
    apg_scale: Annotated[float, Field(ge=0, le=10)] | None = _unset()
    scale_phi: Annotated[float, Field(ge=0, le=1)] | None = _unset()
    cfg_norm_threshold: Annotated[float, Field(ge=0, le=1e6)] | None = _unset()
    sigma_min: Annotated[float, Field(ge=1e-4, le=1e4)] | None = _unset()
    sigma_max: Annotated[float, Field(ge=1e-4, le=1e4)] | None = _unset()
    rho: Annotated[float, Field(ge=0.01, le=100)] | None = _unset()
    duration_padding_sec: Annotated[float, Field(ge=0, le=30)] | None = _unset()
    chunked_decode: bool | None = _unset()
    loop: LoopStart | None = _unset("Start of a clip that repeats without a seam: free or bars.")
    seconds_start: _Start | None = _unset("Start of the clip in a longer piece; for models with this conditioning.")
    seconds_total: _Seconds | None = _unset("Length of that piece.")
    init_audio: RecipeSource | None = _unset("Source of a variation.")
    init_noise_level: Annotated[float, Field(ge=0, le=1000)] | None = _unset(
        "Share of noise; for samplers over sigma, the sigma."
    )
    edit_schedule: EditSchedule | None = _unset()
    inpaint_audio: RecipeSource | None = _unset("Source whose regions were regenerated.")
    inpaint_regions: Annotated[tuple[_Region, ...], Field(strict=False, max_length=MOST_REGIONS)] | None = _unset(
        "[start, end) of each region, seconds."
    )
    extend_before_s: _Seconds | None = _unset("Where this source begins in the clip, seconds; unset = 0.")
    keep: Keep | None = _unset("Audio outside the regions: source or model; unset = model.")
    loras: Annotated[tuple[RecipeLora, ...], Field(strict=False, max_length=64)] | None = _unset("Adapters, in order.")
    lora_stacking: Stacking | None = _unset("How the adapters combine.")
    sections: (
        Annotated[tuple[RecipeSection, ...], Field(strict=False, min_length=1, max_length=MOST_SECTIONS)] | None
    ) = _unset("Sections of a long piece, in order; the seed of each is one higher than that of the one before.")
    overlap: Annotated[float, Field(gt=0, le=1e6)] | None = _unset(
        "Audio that each section continues, seconds; only with sections."
    )
    response_format: Annotated[AudioFormat, Field(strict=False), _FORMATS] = Field(description="File format.")
    bitrate: Annotated[int, Field(ge=8, le=320), _WHOLE] | None = _unset("kbit/s; unset = the format's default.")
    bit_depth: Annotated[BitDepth, _WHOLE] | None = _unset("Bits of a sample; unset = 16.")
    sample_rate: Annotated[int, Field(ge=8000, le=48_000), _WHOLE] | None = _unset("Hertz; unset = the model's.")
    peaks: Peaks | Literal["full"] = Field(
        description="Treatment of peaks; full = the whole generation was scaled to full scale, then cut to `samples`."
    )
    samples: Annotated[int, Field(ge=1, le=2**31), _WHOLE] | None = _unset(
        "Number of samples kept from the start; only with full."
    )
    loudness: RecipeLoudness | None = _unset("Target loudness; the limiter keeps the true peak.")
    fade_in_s: _Seconds | None = _unset("Linear fade at the start, seconds.")
    fade_out_s: _Seconds | None = _unset("Linear fade at the end, seconds.")
    made_on: RecipeMaker

    @model_validator(mode="after")
    def _check_sources(self) -> Recipe:
        for name, setting in (("init_audio", "init_noise_level"), ("inpaint_audio", "inpaint_regions")):
            if (getattr(self, name) is None) != (getattr(self, setting) is None):
                raise ValueError(f"{name} and {setting} belong together")
        if any(start >= end for start, end in self.inpaint_regions or ()):
            raise ValueError("inpaint_regions: each must start before its end")
        if self.inpaint_audio is None and (self.keep is not None or self.extend_before_s is not None):
            raise ValueError("keep and extend_before_s belong to inpaint_audio")
        if self.extend_before_s is not None and self.extend_before_s >= self.duration:
            raise ValueError("extend_before_s must be less than the duration")
        if (self.sections is None) != (self.overlap is None):
            raise ValueError("sections and overlap belong together")
        if self.sections and (self.hashes or self.loop is not None or self.peaks not in ("limit", "clip")):
            raise ValueError("sections have no source audio and no loop, and their peaks are limit or clip")
        if self.loop is not None and self.inpaint_audio is not None:
            raise ValueError("loop does not belong to inpaint_audio")
        is_full = self.peaks == "full"
        if (is_full and self.encoding != PLAIN_WAV) or (self.samples is not None and not is_full):
            raise ValueError("peaks: full is of plain WAV files, and only with full there are samples")
        if is_full and self.finishing != AS_IS:
            raise ValueError("loudness and fades do not belong to peaks: full")
        return self

    @property
    def encoding(self) -> Encoding:
        """How the clip's file is written."""
        return Encoding(self.response_format, self.bitrate, self.bit_depth, self.sample_rate)

    @property
    def finishing(self) -> Finishing:
        """The loudness and the fades of the clip."""
        wanted = self.loudness
        loudness = Loudness(wanted.target_lufs, wanted.true_peak_dbtp) if wanted else None
        return Finishing(loudness, self.fade_in_s or 0.0, self.fade_out_s or 0.0)

    @property
    def hashes(self) -> tuple[str, ...]:
        """The SHA-256 hashes of the source files that a replay needs, without duplicates."""
        return tuple(dict.fromkeys(source.sha256 for source in (self.init_audio, self.inpaint_audio) if source))

    @property
    def num_prompt_chars(self) -> int:
        """The number of characters in all prompts. JSON needs 1 to 12 bytes per character."""
        own = (section.prompt or "" for section in self.sections or ())
        return sum(map(len, (self.prompt, self.negative_prompt or "", *own)))

    def to_request(self, *, sources: Mapping[str, SourceAudio], request_id: str) -> GenerationRequest:
        """Return the request that recreates the clip. `sources` maps SHA-256 hashes to source audio.

        A replica that has loaded other weights than the recipe names refuses the request.
        """
        return GenerationRequest(
            prompt=self.prompt,
            duration_s=self.duration,
            seed=self.seed,
            start_s=self.seconds_start or 0.0,
            conditioned_total_s=self.seconds_total,
            negative_prompt=self.negative_prompt,
            steps=self.steps,
            cfg_scale=self.cfg_scale,
            sampler=self.sampler,
            sigma_min=self.sigma_min,
            sigma_max=self.sigma_max,
            rho=self.rho,
            apg_scale=self.apg_scale,
            cfg_rescale=self.scale_phi or 0.0,
            cfg_norm_threshold=self.cfg_norm_threshold or 0.0,
            duration_padding_s=self.duration_padding_sec,
            chunked_decode=self.chunked_decode,
            loop=self.loop,
            init_audio=sources[self.init_audio.sha256] if self.init_audio else None,
            init_noise_level=1.0 if self.init_noise_level is None else self.init_noise_level,
            edit_schedule=self.edit_schedule,
            inpaint_audio=sources[self.inpaint_audio.sha256] if self.inpaint_audio else None,
            inpaint_regions_s=self.inpaint_regions or (),
            source_start_s=self.extend_before_s or 0.0,
            keep=self.keep or "model",
            loras=tuple(one.to_lora() for one in self.loras or ()),
            lora_stacking=self.lora_stacking,
            checkpoint=self.checkpoint,
            request_id=request_id,
        )

    def to_json(self) -> str:
        """Return the recipe as JSON in its canonical form: printable ASCII, sorted keys, no spaces between tokens."""
        return _to_text(self.model_dump())

    def to_short_json(self) -> str:
        """Return the recipe as JSON without its long fields; `left_out` lists them. This JSON cannot be replayed."""
        left_out = [name for name in _LONG if getattr(self, name) is not None]
        return _to_text({**self.model_dump(exclude={*left_out}), "left_out": left_out})


def _to_text(recipe: Mapping[str, Any]) -> str:
    text = json.dumps(recipe, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.replace("\x7f", "\\u007f")  # the only control character that `json` does not escape


def write_recipes(
    request: GenerationRequest,
    *,
    sources: Mapping[Role, RecipeSource],
    model: str,
    seeds: Sequence[int],
    made_on: MadeOn,
    encoding: Encoding,
    peaks: Peaks | Literal["full"],
    finishing: Finishing = AS_IS,
    samples: int | None = None,
) -> tuple[Recipe, ...]:
    """Return the recipe of each variation of a request. The recipes differ only in the seed and the prompt."""
    provenance = made_on.provenance
    init, inpaint = sources.get("init"), sources.get("inpaint")
    used = provenance or request  # the provenance has the values of unset parameters, under the same names
    first = Recipe.model_construct(
        recipe=1,
        model=model,
        checkpoint=provenance.loaded.checkpoint if provenance else None,
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        duration=float(request.duration_s),
        seed=seeds[0],
        steps=used.steps,
        cfg_scale=_to_float(used.cfg_scale),
        sampler=used.sampler,
        apg_scale=_to_float(used.apg_scale),
        scale_phi=request.cfg_rescale or None,
        cfg_norm_threshold=request.cfg_norm_threshold or None,
        sigma_min=request.sigma_min,
        sigma_max=request.sigma_max,
        rho=request.rho,
        duration_padding_sec=_to_float(used.duration_padding_s),
        chunked_decode=request.chunked_decode,
        loop=request.loop,
        seconds_start=_to_float(request.start_s) or None,
        seconds_total=_to_float(request.conditioned_total_s),
        init_audio=init,
        init_noise_level=_to_float(request.init_noise_level) if init else None,
        edit_schedule=used.edit_schedule,
        inpaint_audio=inpaint,
        inpaint_regions=tuple((float(start), float(end)) for start, end in request.inpaint_regions_s)
        if inpaint
        else None,
        extend_before_s=float(request.source_start_s) or None if inpaint else None,
        keep=request.keep if inpaint else None,
        loras=tuple(map(RecipeLora.of, used.loras)) or None,
        lora_stacking=used.lora_stacking if used.loras else None,
        response_format=encoding.file_format,
        bitrate=encoding.bitrate_kbps,
        bit_depth=encoding.bit_depth,
        sample_rate=encoding.sample_rate_hz,
        peaks=peaks,
        samples=samples,
        loudness=RecipeLoudness.of(finishing.loudness) if finishing.loudness else None,
        fade_in_s=float(finishing.fade_in_s) or None,
        fade_out_s=float(finishing.fade_out_s) or None,
        made_on=write_maker(made_on, codecs=_codecs_of(encoding, sources)),
    )
    own = zip(request.prompts, seeds, strict=True)
    return tuple(first.model_copy(update={"prompt": prompt, "seed": seed}) for prompt, seed in own)


def add_sections(
    recipe: Recipe, sections: Sequence[Section], *, overlap_s: float, different: Mapping[int, MadeOn]
) -> Recipe:
    """Return `recipe` with the sections of a long piece added.

    `different` maps the number of a section, from 1, to what made the section, if that differs from `recipe.made_on`.
    """

    def describe(number: int, section: Section) -> RecipeSection:
        made_on = different.get(number)
        provenance = made_on.provenance if made_on else None
        return RecipeSection.model_construct(
            prompt=section.prompt,
            duration=float(section.duration_s),
            checkpoint=provenance.loaded.checkpoint if provenance else None,
            made_on=write_maker(made_on, codecs=recipe.made_on.codecs) if made_on else None,
        )

    parts = tuple(describe(number, section) for number, section in enumerate(sections, start=1))
    return recipe.model_copy(update={"sections": parts, "overlap": float(overlap_s)})


def write_maker(made_on: MadeOn, *, codecs: str | None) -> RecipeMaker:
    """Return a recipe's description of software and hardware. `codecs` names the audio libraries, if any were used."""
    provenance = made_on.provenance
    if provenance is None:
        return RecipeMaker(device=made_on.device, dtype=made_on.dtype)
    return RecipeMaker(
        version=provenance.version,
        torch=provenance.torch,
        transformers=provenance.transformers,
        device=made_on.device,
        processor=provenance.processor,
        dtype=made_on.dtype,
        decode_precision=provenance.loaded.decode_precision,
        networks=provenance.loaded.networks,
        mode=provenance.mode,
        threads=provenance.threads,
        slots=provenance.slots,
        is_compiled=provenance.is_compiled,
        profile=provenance.profile,
        attention=provenance.attention,
        has_fused_kernels=provenance.has_fused_kernels,
        codecs=codecs,
    )


def _codecs_of(encoding: Encoding, sources: Collection[str]) -> str | None:
    is_plain = encoding.file_format in (AudioFormat.WAV, AudioFormat.PCM) and encoding.sample_rate_hz is None
    if not sources and is_plain:
        return None
    from stable_audio_serve.audio.encode import name_codecs  # imported late, because NumPy is not needed otherwise

    return name_codecs(with_aac=encoding.file_format in (AudioFormat.M4A, AudioFormat.AAC))


def is_exact(recipe: Recipe, made_on: MadeOn) -> bool:
    """Whether a replay that ran on `made_on` certainly has the same bytes as the original.

    This is so if both ran in strict mode with the same weights, kind of device, processor, versions and precisions.
    """
    now = made_on.provenance
    codecs = _codecs_of(recipe.encoding, recipe.hashes)
    return (
        now is not None
        and now.mode == "strict"
        and recipe.checkpoint is not None
        and recipe.checkpoint == now.loaded.checkpoint
        and recipe.made_on == write_maker(made_on, codecs=codecs)
    )


def _to_float(value: float | None) -> float | None:
    """Convert a number to float, because 2 and 2.0 are equal in Python but differ as JSON text."""
    return None if value is None else float(value)
