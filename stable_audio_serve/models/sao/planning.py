"""Plans a request for a Stable Audio Open model: computes one RowPlan per variation, on the CPU.

The network always generates its longest duration, and the clip is the beginning of the result. The network was not
trained for shorter durations, and they would have other noise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

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
from stable_audio_serve.models.protocol import ModelSpec, RowPlan, WindowRule
from stable_audio_serve.models.sao.config import SHIFT_KEY
from stable_audio_serve.models.sao.network_config import OobleckConfig
from stable_audio_serve.models.windows import audible_windows, halo_windows, whole_window
from stable_audio_serve.sampling.blend import blend_plan, flow_path
from stable_audio_serve.sampling.karras import HIGHEST_SIGMA, LOWEST_SIGMA, SigmaRange
from stable_audio_serve.sampling.open_flow import build_open_flow_plan, open_flow_times
from stable_audio_serve.sampling.plan import Guidance, SamplerPlan
from stable_audio_serve.sampling.schedules import (
    MIN_NOISE_LEVEL,
    NoShift,
    TimestepShift,
    edit_times,
    shift_from_config,
)
from stable_audio_serve.sampling.v_samplers import OVER_TIME, build_v_plan, v_path

# The reference implementation's lowest and highest noise level. By default, the lowest level is at most _MIN_SHARE of
# the highest one.
SIGMA_MIN, SIGMA_MAX = 0.3, 500.0
_MIN_SHARE = 0.5


def read_shift(options: Mapping[str, Any] | None) -> TimestepShift:
    """Returns the timestep shift that a config section describes; `NoShift` for None.

    Raises CheckpointError naming the key that cannot be used.
    """
    return NoShift() if options is None else shift_from_config(options, key=f"model.diffusion.{SHIFT_KEY}")


def plan_rows(
    request: GenerationRequest,
    *,
    spec: ModelSpec,
    autoencoder: OobleckConfig | None,
    shift: TimestepShift,
    frames: int | None,
) -> tuple[RowPlan, ...]:
    """Returns one plan per variation. The plans differ only in their seed and their prompt.

    If `autoencoder` is None, audio is encoded and decoded as a single window. `shift` is the model's timestep shift.
    `frames` overrides the number of latent frames, and the duration is then not limited. Raises InvalidRequestError
    naming the field.
    """
    check_request(request, spec.card)
    _refuse_unsupported(request, spec)
    check_duration(request, spec, is_limited=frames is None)
    frames = spec.max_frames if frames is None else frames
    guidance = Guidance(
        cfg_scale=spec.card.default_cfg_scale if request.cfg_scale is None else request.cfg_scale,
        apg_scale=0.0,
        rescale=request.cfg_rescale,
        interval=request.cfg_interval,
    )
    sampler = _plan_sampler(request, spec, shift=shift, guidance=guidance, frames=frames)
    guided = any(evaluation.guided for evaluation in sampler.evaluations)
    keep_mask = plan_keep_mask(request, frames=frames, hop=spec.hop, sample_rate_hz=spec.card.sample_rate_hz)
    numbers, negative_numbers = _numbers(request)
    decode_rule, windows = None, whole_window(frames)
    if autoencoder is not None:
        windows = halo_windows(frames, halo=autoencoder.encoder_halo_latents)
        if request.chunked_decode is not False:
            decode_rule = WindowRule(autoencoder.decoder_halo_latents)
    # The model's longest duration may end within a latent frame. The samples of this partial frame are included,
    # because they affect the latents before it.
    num_samples = frames * spec.hop + (spec.tail_samples if frames == spec.max_frames else 0)
    init, inpaint = plan_sources(request, spec, frames=frames, num_samples=num_samples, windows=windows)
    output_samples = min(max(int(request.duration_s * spec.card.sample_rate_hz), 1), frames * spec.hop)
    num_audible = math.ceil(output_samples / spec.hop)
    decode_windows = (
        whole_window(frames)
        if decode_rule is None
        else audible_windows(frames, num_audible=num_audible, rule=decode_rule)
    )
    return tuple(
        RowPlan(
            seed=seed,
            frames=frames,
            valid_frames=frames,
            output_samples=output_samples,
            prompt=prompt,
            negative_prompt=request.negative_prompt if guided and (request.negative_prompt or "").strip() else None,
            numbers=numbers,
            negative_numbers=negative_numbers,
            sampler=sampler,
            guidance=guidance,
            init_source=init,
            inpaint_source=inpaint,
            keep_mask=keep_mask,
            decode_windows=decode_windows,
            decode_rule=decode_rule,
        )
        for prompt, seed in zip(request.prompts, request.seeds, strict=True)
    )


def _refuse_unsupported(request: GenerationRequest, spec: ModelSpec) -> None:
    """Raise InvalidRequestError if the request sets a parameter that the model does not support."""
    name = spec.card.name
    for field, asked in (
        ("apg_scale", request.apg_scale),
        ("cfg_norm_threshold", request.cfg_norm_threshold),
    ):
        if asked:
            raise InvalidRequestError(f"{field} is not supported by {name}", field=field, allowed="0 or unset")
    if request.edit_schedule is not None and spec.card.objective == "v":
        message = f"edit_schedule has no meaning for {name}, whose samplers run over sigma"
        raise InvalidRequestError(message, field="edit_schedule", allowed="unset")


def _numbers(request: GenerationRequest) -> tuple[Mapping[str, float], Mapping[str, float]]:
    """Returns the values of the number conditioners, in seconds, for the prompt and for the negative prompt."""
    total_s = request.conditioned_total_s
    start = request.start_s
    numbers = {"seconds_start": start, "seconds_total": start + request.duration_s if total_s is None else total_s}
    other = {"seconds_start": request.negative_start_s, "seconds_total": request.negative_total_s}
    return numbers, numbers | {id_: value for id_, value in other.items() if value is not None}


def _plan_sampler(
    request: GenerationRequest,
    spec: ModelSpec,
    *,
    shift: TimestepShift,
    guidance: Guidance,
    frames: int,
) -> SamplerPlan:
    steps = spec.card.default_steps if request.steps is None else request.steps
    sampler = request.sampler or spec.default_sampler
    has_source = request.init_audio is not None
    if spec.card.objective == "v":
        span = _sigma_range(request, over_time=sampler in OVER_TIME)
        plan, path = build_v_plan(sampler, steps, span=span, guidance=guidance, has_source=has_source), v_path(sampler)
    else:

        def build(level: float) -> Tensor:
            return open_flow_times(sampler, steps, level=level, shift=shift, length=frames)

        level = None
        if has_source:
            level = max(require_share(request.init_noise_level), MIN_NOISE_LEVEL)
            times = edit_times(build, level, schedule=request.edit_schedule or spec.card.default_edit_schedule)
        else:
            times = build(_first_time(request.sigma_max))
        plan = build_open_flow_plan(sampler, times, guidance=guidance, has_source=has_source, level=level)
        path = flow_path
    return plan if request.inpaint_audio is None else blend_plan(plan, path)  # no mask input: blend


def _sigma_range(request: GenerationRequest, *, over_time: bool) -> SigmaRange:
    """Returns the lowest and highest noise level for a model that predicts v.

    The highest level of an edit is the request's `init_noise_level`. If `over_time`, the sampler's levels are times in
    0..1.
    """
    highest = SIGMA_MAX if request.sigma_max is None else request.sigma_max
    if request.init_audio is not None:
        level = request.init_noise_level
        if over_time:
            highest = max(require_share(level), MIN_NOISE_LEVEL)
        elif not LOWEST_SIGMA < level <= HIGHEST_SIGMA:
            allowed = f"above {LOWEST_SIGMA:g}, at most {HIGHEST_SIGMA:g}"
            message = f"init_noise_level must be {allowed} for a sampler over sigma, got {level:g}"
            raise InvalidRequestError(message, field="init_noise_level", allowed=allowed)
        else:
            highest = level
            if request.sigma_min is not None and request.sigma_min >= level:
                message = f"sigma_min must be below the level of the edit, {level:g}, got {request.sigma_min:g}"
                raise InvalidRequestError(message, field="sigma_min", allowed=f"below {level:g}")
    lowest = request.sigma_min
    if lowest is None or over_time:  # samplers over time ignore the request's sigma_min
        lowest = max(min(SIGMA_MIN, highest * _MIN_SHARE), LOWEST_SIGMA)
    return SigmaRange(lowest, highest, 1.0 if request.rho is None else request.rho)


def _first_time(sigma_max: float | None) -> float:
    """Returns the time at which a flow model starts: `sigma_max` but at most 1, as in the reference implementation."""
    time = 1.0 if sigma_max is None else min(sigma_max, 1.0)
    if not time >= MIN_NOISE_LEVEL:
        allowed = f"at least {MIN_NOISE_LEVEL:g}"
        raise InvalidRequestError(f"sigma_max must be {allowed}, got {sigma_max}", field="sigma_max", allowed=allowed)
    return time
