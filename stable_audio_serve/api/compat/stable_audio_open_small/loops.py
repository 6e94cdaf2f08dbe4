"""Loops from text, from an upload, or from a riff. A loop is the first whole bars of a generated clip."""

from __future__ import annotations

import re
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from stable_audio_serve.api.compat.stable_audio_open_small.clips import answer, length_s, make_clip, read_upload
from stable_audio_serve.api.compat.stable_audio_open_small.riffs import RiffLibrary, read_riff
from stable_audio_serve.api.compat.stable_audio_open_small.schemas import LoopForm, RiffForm
from stable_audio_serve.api.compat.stable_audio_open_small.windowed_model import (
    WindowedModel,
    default_model,
    find_model,
)
from stable_audio_serve.api.service import Service, resolve_seed
from stable_audio_serve.audio.loops import Loop, plan_loop, read_tempo
from stable_audio_serve.core.errors import InvalidRequestError
from stable_audio_serve.core.generation import GenerationRequest, GenerationResult, SourceAudio

_NOT_DRUMS = "melody, harmony, pitched instruments, vocals, singing"
_NOT_INSTRUMENTS = "drums, percussion, kick, snare, hi-hat"
# The pattern starts only at the first letter of a word. Otherwise the search in a long word would take quadratic time.
_DRUM_WORD = re.compile(r"(?<![^\W\d_])[^\W\d_]*drum[^\W\d_]*(\s*,)?", re.IGNORECASE)


async def make_loop(service: Service, request: Request, *, form: LoopForm) -> Response:
    """Handle `POST /generate/loop`."""
    started_at = service.clock.monotonic()
    model = find_model(service, form)
    loop = _plan(model, form)
    source = await read_upload(service, form.audio_file, model=model) if form.audio_file else None
    generation = _to_generation(request, model, form=form, source=source, seed=resolve_seed(form.seed))
    num_samples = loop.num_samples(model.card.sample_rate_hz)
    output = await make_clip(
        service, request, card=model.card, generation=generation, started_at=started_at, num_samples=num_samples
    )
    extras = {
        "calculated_duration_seconds": round(loop.duration_s, 2),
        "available_audio_seconds": round(length_s(output.result), 2),
        "seconds_per_bar": round(loop.bar_s, 2),
        "model_type": form.model_type,
    }
    return await answer(
        service,
        output,
        return_format=form.return_format,
        name=f"loop_{_name(form, loop, seed=generation.seed)}",
        metadata=_metadata(form, loop, generation=generation, result=output.result) | extras,
    )


async def make_riff_loop(service: Service, request: Request, *, form: RiffForm, library: RiffLibrary) -> Response:
    """Handle `POST /generate/loop-with-riff`."""
    started_at = service.clock.monotonic()
    model = default_model(service)
    loop = _plan(model, form)
    seed = resolve_seed(form.seed)
    source = await read_riff(service, library.choose(form.key, seed=seed), tempo_bpm=loop.tempo_bpm)
    generation = _to_generation(request, model, form=form, source=source, seed=seed)
    num_samples = loop.num_samples(model.card.sample_rate_hz)
    output = await make_clip(
        service, request, card=model.card, generation=generation, started_at=started_at, num_samples=num_samples
    )
    return await answer(
        service,
        output,
        return_format=form.return_format,
        name=f"riff_{form.key}_{_name(form, loop, seed=seed)}",
        metadata=_metadata(form, loop, generation=generation, result=output.result)
        | {"key": form.key, "source": "personal_riff_library"},
    )


def rewrite_prompt(prompt: str, loop_type: str) -> tuple[str, str]:
    """Return `prompt` adapted to the loop type (drums, instruments or auto), and a matching negative prompt."""
    has_drum = "drum" in prompt.casefold()
    if loop_type == "drums":
        return prompt if has_drum else f"{prompt} drum loop", _NOT_DRUMS
    if loop_type == "instruments":
        return " ".join(_DRUM_WORD.sub("", prompt).split()).strip(" ,") if has_drum else prompt, _NOT_INSTRUMENTS
    return prompt, ""


def _plan(model: WindowedModel, form: LoopForm | RiffForm) -> Loop:
    tempo_bpm = read_tempo(form.prompt)
    assert tempo_bpm is not None  # the form refuses prompts without a tempo
    loop = plan_loop(tempo_bpm, bars=form.bars, window_s=model.window_s)
    if not loop.num_samples(model.card.sample_rate_hz):
        message = f"prompt: {loop.bars} bars at {tempo_bpm}bpm are shorter than one sample"
        raise InvalidRequestError(message, field="prompt")
    return loop


def _to_generation(
    request: Request, model: WindowedModel, *, form: LoopForm | RiffForm, source: SourceAudio | None, seed: int
) -> GenerationRequest:
    prompt, negative_prompt = rewrite_prompt(form.prompt, form.loop_type)
    return GenerationRequest(
        prompt=prompt,
        duration_s=model.window_s,
        conditioned_total_s=model.conditioned_s,
        seed=seed,
        negative_prompt=negative_prompt,
        steps=model.steps(form.steps, at_most=250),
        cfg_scale=form.cfg_scale,
        init_audio=source,
        init_noise_level=form.style_strength if source else 1.0,
        request_id=request.state.request_id,
    )


def _name(form: LoopForm | RiffForm, loop: Loop, *, seed: int) -> str:
    return f"{form.loop_type}_{loop.tempo_bpm}bpm_{loop.bars}bars_{seed}.wav"


def _metadata(
    form: LoopForm | RiffForm, loop: Loop, *, generation: GenerationRequest, result: GenerationResult
) -> dict[str, Any]:
    """Return the metadata that loops from text, uploads and riffs have in common."""
    is_transfer = generation.init_audio is not None
    return {
        "prompt": generation.prompt,
        "original_prompt": form.prompt,
        "negative_prompt": generation.negative_prompt,
        "loop_type": form.loop_type,
        "detected_bpm": loop.tempo_bpm,
        "bars": loop.bars,
        "loop_duration_seconds": round(min(loop.duration_s, length_s(result)), 2),
        "style_transfer": is_transfer,
        "style_strength": form.style_strength if is_transfer else None,
        "steps": generation.steps,
        "cfg_scale": form.cfg_scale,
        "seed": generation.seed,
        "sample_rate": result.sample_rate_hz,
        "generation_time": round(result.timings.total_ms / 1000, 2),
        "device": result.device.kind,
    }
