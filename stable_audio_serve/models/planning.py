"""What the planning of a request has in common in every model family: checks of the request, its source audio, and
which latent frames of the source an edit keeps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from stable_audio_serve.audio.keep import is_continuation
from stable_audio_serve.audio.prepare import prepare_source
from stable_audio_serve.core.catalog import ModelCard
from stable_audio_serve.core.errors import InvalidRequestError
from stable_audio_serve.core.generation import MAX_PROMPT_CHARS, GenerationRequest, SourceAudio
from stable_audio_serve.models.protocol import ModelSpec, SourcePlan, WindowSpan


def check_request(request: GenerationRequest, card: ModelCard) -> None:
    """Raise InvalidRequestError, which names the field, if no model or not this one can use one of the request's
    values.
    """
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
    if request.cfg_rescale and card.latent_channels == 1:
        message = f"scale_phi needs several latent channels, {card.name} has one"
        raise InvalidRequestError(message, field="scale_phi", allowed="0 or unset")
    if request.source_start_s and not 0 <= request.source_start_s < request.duration_s:
        message = "the source must begin in the clip"
        raise InvalidRequestError(message, field="extend_before_s", allowed=f"0..{request.duration_s:g}")
    if request.duration_padding_s is not None and request.duration_padding_s < 0:
        raise InvalidRequestError("duration_padding_sec must not be negative", field="duration_padding_sec")


def check_duration(request: GenerationRequest, spec: ModelSpec, *, is_limited: bool) -> None:
    """Raise InvalidRequestError if the duration is not above 0 or, if `is_limited`, above the model's longest one."""
    duration_s, cap_s = request.duration_s, spec.card.max_duration_s
    allowed = f"0..{cap_s:g}"
    if not math.isfinite(duration_s) or duration_s <= 0:
        raise InvalidRequestError("duration must be above 0", field="duration", allowed=allowed)
    if is_limited and duration_s > cap_s:
        message = f"duration must be at most {cap_s:g} s for {spec.card.name}, got {duration_s:g}"
        raise InvalidRequestError(message, field="duration", allowed=allowed)


def require_share(level: float) -> float:
    """Returns the noise level of an edit. Raises InvalidRequestError if it is not in 0..1."""
    if not 0 <= level <= 1:
        raise InvalidRequestError("init_noise_level must be in 0..1", field="init_noise_level", allowed="0..1")
    return level


def plan_sources(
    request: GenerationRequest, spec: ModelSpec, *, frames: int, num_samples: int, windows: Sequence[WindowSpan]
) -> tuple[SourcePlan | None, SourcePlan | None]:
    """Returns the request's source of a variation and its source of an inpainting, each None if the request has none.

    Sources get the model's sample rate and channels, and are cut or padded to `num_samples`. `windows` are those in
    which the `frames` latent frames are encoded. A source begins where the request says. A variation that starts from
    its source is filled with repetitions of the source before and after it, not with silence.
    """
    start = int(request.source_start_s * spec.card.sample_rate_hz)

    def plan(audio: SourceAudio | None, *, is_repeated: bool) -> SourcePlan | None:
        if audio is None:
            return None
        samples = prepare_source(
            audio,
            sample_rate_hz=spec.card.sample_rate_hz,
            channels=spec.card.channels,
            num_samples=num_samples,
            start=start,
            is_repeated=is_repeated,
        )
        return SourcePlan(samples=samples, frames=frames, windows=tuple(windows))

    init = plan(request.init_audio, is_repeated=request.starts_from_its_source)
    return init, plan(request.inpaint_audio, is_repeated=False)


def plan_keep_mask(request: GenerationRequest, *, frames: int, hop: int, sample_rate_hz: int) -> Tensor | None:
    """Returns a mask (frames,) float32: 1 where the source's latent is kept, 0 where a latent is generated.

    A frame is kept if its first sample is at or after the start of the source, before the end of the clip, and outside
    every inpainting region. Without regions nothing is kept, as in the reference implementations. Returns None for a
    request without source audio to inpaint. `hop` is the number of samples per frame. Raises InvalidRequestError naming
    the field.

    With `keep="source"`, a region that continues the source begins at the frame in which the source ends. The latent of
    that frame also encodes silence after the source. If it were kept, the clip could have up to a frame of silence.
    """
    field = "inpaint_start_seconds"
    if request.inpaint_audio is None:
        if request.inpaint_regions_s:
            raise InvalidRequestError("inpaint regions need audio to keep", field="audio")
        return None
    if not request.inpaint_regions_s:
        return torch.zeros(frames)
    first_samples = torch.arange(frames) * hop
    source = request.inpaint_audio
    source_start = int(request.source_start_s * sample_rate_hz)
    source_end = source_start + source.resampled_length(to_hz=sample_rate_hz)
    keep = (first_samples >= source_start) & (first_samples < int(request.duration_s * sample_rate_hz))
    for start_s, end_s in request.inpaint_regions_s:
        if not (math.isfinite(start_s) and math.isfinite(end_s) and 0 <= start_s < end_s):
            raise InvalidRequestError(f"inpaint region {start_s}..{end_s} must have 0 <= start < end", field=field)
        start, end = int(start_s * sample_rate_hz), int(end_s * sample_rate_hz)
        continues = is_continuation(start, end, source_end=source_end, sample_rate_hz=sample_rate_hz)
        if request.keep == "source" and continues:
            start = min(start, source_end - source_end % hop)
        keep &= (first_samples < start) | (first_samples >= end)
    return keep.float()
