"""Plans a request: computes lengths, windows, schedule and masks of each variation, on the CPU."""

from __future__ import annotations

import math
from dataclasses import replace

from torch import Tensor

from stable_audio_serve.core.errors import InvalidRequestError
from stable_audio_serve.core.generation import GenerationRequest
from stable_audio_serve.models.planning import (
    check_duration,
    check_request,
    plan_keep_mask,
    plan_sources,
    require_share,
)
from stable_audio_serve.models.protocol import ModelSpec, RowPlan, SourcePlan, WindowRule, WindowSpan
from stable_audio_serve.models.sa3.config import Sa3Config
from stable_audio_serve.models.sa3.lengths import RowLength, plan_length
from stable_audio_serve.models.windows import are_exact, audible_windows, chunked_windows, whole_window
from stable_audio_serve.sampling.plan import Guidance, SamplerPlan
from stable_audio_serve.sampling.samplers import build_plan
from stable_audio_serve.sampling.schedules import (
    MIN_NOISE_LEVEL,
    TimestepShift,
    build_sigmas,
    edit_times,
)

DEFAULT_APG_SCALE = 1.0


def plan_rows(
    request: GenerationRequest,
    *,
    config: Sa3Config,
    spec: ModelSpec,
    decode_rule: WindowRule,
    shift: TimestepShift,
    frames: int | None,
) -> tuple[RowPlan, ...]:
    """Returns one plan per variation. The plans differ only in their seed and their prompt.

    `decode_rule` is the rule for decoding in windows. It is not used if the request or the config selects the reference
    implementation's windows or a single window, nor if these windows change the audio. `shift` is the model's timestep
    shift. `frames` overrides the number of latent frames; the duration is then not limited, and a clip longer than
    these frames is cut. Raises InvalidRequestError naming the field.
    """
    check_request(request, spec.card)
    for field, level in (("sigma_min", request.sigma_min), ("sigma_max", request.sigma_max), ("rho", request.rho)):
        if level is not None:
            raise InvalidRequestError(f"{field} has no meaning for {spec.card.name}", field=field, allowed="unset")
    require_share(request.init_noise_level)
    check_duration(request, spec, is_limited=frames is None)
    padding_s = (
        spec.card.default_duration_padding_s if request.duration_padding_s is None else request.duration_padding_s
    )
    length = plan_length(request.duration_s, config.lengths, padding_s=padding_s, frames=frames)
    sampler, guidance = _plan_sampler(request, spec=spec, shift=shift, length=length)
    guided = any(evaluation.guided for evaluation in sampler.evaluations)
    negative = request.negative_prompt if guided and (request.negative_prompt or "").strip() else None
    windows = _windows(length.frames, chunked=config.chunked)
    is_free = config.chunked and request.chunked_decode is None and are_exact(windows, decode_rule)
    rule = decode_rule if is_free else None
    chunks_decoding = config.chunked if request.chunked_decode is None else request.chunked_decode
    init, inpaint = plan_sources(
        request, spec, frames=length.frames, num_samples=length.frames * spec.hop, windows=windows
    )
    if inpaint is not None and not config.edits:
        raise InvalidRequestError("this model cannot inpaint", field="audio")
    keep_mask = plan_keep_mask(request, frames=length.frames, hop=spec.hop, sample_rate_hz=spec.card.sample_rate_hz)
    if inpaint is not None and keep_mask is not None:
        inpaint = _without_unused_windows(inpaint, keep_mask)
    decode_windows = (
        _windows(length.frames, chunked=chunks_decoding)
        if rule is None
        else audible_windows(length.frames, num_audible=math.ceil(length.output_samples / spec.hop), rule=rule)
    )
    seconds = {"seconds_start": 0.0, "seconds_total": request.duration_s}
    tempo = next(iter(config.timelines.values()), None)
    return tuple(
        RowPlan(
            seed=seed,
            frames=length.frames,
            valid_frames=length.valid_frames,
            output_samples=length.output_samples,
            prompt=prompt,
            negative_prompt=negative,
            numbers=seconds if tempo is None else seconds | {"tempo_bpm": tempo.read(prompt)},
            sampler=sampler,
            guidance=guidance,
            init_source=init,
            inpaint_source=inpaint,
            keep_mask=keep_mask,
            decode_windows=decode_windows,
            decode_rule=rule,
        )
        for prompt, seed in zip(request.prompts, request.seeds, strict=True)
    )


def _plan_sampler(
    request: GenerationRequest, *, spec: ModelSpec, shift: TimestepShift, length: RowLength
) -> tuple[SamplerPlan, Guidance]:
    guidance = Guidance(
        cfg_scale=spec.card.default_cfg_scale if request.cfg_scale is None else request.cfg_scale,
        apg_scale=DEFAULT_APG_SCALE if request.apg_scale is None else request.apg_scale,
        norm_threshold=request.cfg_norm_threshold,
        rescale=request.cfg_rescale,
        interval=request.cfg_interval,
    )
    has_source = request.init_audio is not None
    steps = spec.card.default_steps if request.steps is None else request.steps

    def build(level: float) -> Tensor:
        return build_sigmas(steps, shift, length=length.effective_frames, sigma_max=level)

    level = max(request.init_noise_level, MIN_NOISE_LEVEL) if has_source else 1.0
    sigmas = edit_times(build, level, schedule=request.edit_schedule or spec.card.default_edit_schedule)
    sampler = request.sampler or spec.default_sampler
    return build_plan(sampler, sigmas, guidance=guidance, has_source=has_source), guidance


def _without_unused_windows(source: SourcePlan, keep_mask: Tensor) -> SourcePlan:
    """Returns the source of an edit with only the windows that contain a kept frame, or one window if no frame is kept.

    The denoiser gets the latents of kept frames only, so continuing a short source to a long clip encodes the source,
    not the silence after it.
    """
    used = [window for window in source.windows if keep_mask[window.keep_start : window.keep_stop].any()]
    return replace(source, windows=tuple(used) or source.windows[:1])


def _windows(frames: int, *, chunked: bool) -> tuple[WindowSpan, ...]:
    return chunked_windows(frames) if chunked else whole_window(frames)
