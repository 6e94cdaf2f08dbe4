"""Convert vLLM-Omni's requests and results. The client gets a part (span) of what the model generates."""

from __future__ import annotations

from dataclasses import dataclass

from stable_audio_serve.api.compat.vllm_omni.schemas import AudioBody
from stable_audio_serve.api.service import resolve_seed
from stable_audio_serve.audio.encode import encode_audio
from stable_audio_serve.audio.finish import FinishedFile, finish_clip
from stable_audio_serve.audio.formats import file_rate
from stable_audio_serve.audio.stretch import time_stretch
from stable_audio_serve.core.catalog import ModelCard
from stable_audio_serve.core.errors import InvalidRequestError
from stable_audio_serve.core.generation import SEED_LIMIT, GenerationRequest, GenerationResult
from stable_audio_serve.core.settings import AudioSettings
from stable_audio_serve.core.sound import AudioFormat, Encoding

_WINDOW_S = 1024 * 2048 / 44_100  # longest clip of Stable Audio Open 1.0, for which the original server was written
_MAX_END_S = 512.0  # the largest start and end, in seconds, that Stable Audio Open 1.0 can be conditioned on
_DEFAULT_STEPS = 50
_DEFAULT_GUIDANCE = 7.0


@dataclass(frozen=True, slots=True)
class Span:
    """The part of a generation from `start_s` to `end_s`, in seconds."""

    start_s: float
    end_s: float


def resolve_span(body: AudioBody, *, cap_s: float) -> Span:
    """Return the span that a request selects in a generation of at most `cap_s` seconds. Raises InvalidRequestError.

    A span that ends after `cap_s` is cut off there, as in the original server.
    """
    if body.audio_length is None:
        return Span(0.0, min(_WINDOW_S, cap_s))
    start_s, length_s = body.audio_start or 0.0, body.audio_length
    if length_s > cap_s:
        message = f"audio_length {length_s:g} exceeds maximum {cap_s:g} seconds, the longest clip of the model"
        raise InvalidRequestError(message, field="audio_length", allowed=f"0 to {cap_s:g}")
    if not 0 <= start_s <= _MAX_END_S:
        message = f"audio_start {start_s:g} must be from 0 to {_MAX_END_S:g} seconds"
        raise InvalidRequestError(message, field="audio_start", allowed=f"0 to {_MAX_END_S:g}")
    if start_s >= cap_s:
        message = f"audio_start {start_s:g} must be less than the longest clip, {cap_s:g} seconds"
        raise InvalidRequestError(message, field="audio_start", allowed=f"0 to {cap_s:g}")
    if start_s + length_s > _MAX_END_S:
        message = f"audio_start + audio_length must be at most {_MAX_END_S:g} seconds"
        raise InvalidRequestError(message, field="audio_start")
    return Span(start_s, min(start_s + length_s, cap_s))


def to_request(body: AudioBody, card: ModelCard, *, span: Span, request_id: str) -> GenerationRequest:
    """Return a request for the audio from 0 s to the end of the span.

    A model that is conditioned on a start also gets the start of the span.
    """
    guidance = _DEFAULT_GUIDANCE if body.guidance_scale is None else body.guidance_scale
    return GenerationRequest(
        prompt=body.input,
        duration_s=span.end_s,
        start_s=span.start_s if card.conditions_on_start else 0.0,
        conditioned_total_s=span.end_s,
        seed=resolve_seed(-1 if body.seed is None else body.seed % SEED_LIMIT),
        negative_prompt=body.negative_prompt or None,
        steps=_DEFAULT_STEPS if body.num_inference_steps is None else body.num_inference_steps,
        cfg_scale=max(guidance, 1.0),  # the original server disables guidance if the value is 1 or less
        request_id=request_id,
    )


def make_file(body: AudioBody, *, span: Span, result: GenerationResult, settings: AudioSettings) -> FinishedFile:
    """Cut the span out of a result and encode it with the requested speed and format. Call it from a worker thread."""
    rate_hz = result.sample_rate_hz
    audio = result.audio[0]
    audio = audio[:, min(int(span.start_s * rate_hz), audio.shape[1] - 1) :]  # at least one sample
    audio = time_stretch(audio, rate_hz, speed=1.0 if body.speed is None else body.speed)
    audio, facts = finish_clip(audio, rate_hz, seed=result.seeds[0], peaks=body.peaks or settings.peaks)
    encoding = Encoding(AudioFormat(body.response_format))
    return FinishedFile(encode_audio(audio, rate_hz, encoding=encoding), file_rate(encoding, rate_hz), (facts,))
