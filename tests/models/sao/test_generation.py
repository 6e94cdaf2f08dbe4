"""Samplers, transformer and autoencoder of the package reproduce whole runs of the reference code.

Random numbers are drawn as in the reference code, and the conditioning is stored with the runs.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import starmap
from typing import Any

import pytest
import torch
from torch import Tensor

from stable_audio_serve.audio.prepare import prepare_source
from stable_audio_serve.core.generation import SourceAudio
from stable_audio_serve.models.sao.denoiser import Denoiser, DenoiserConditioning
from stable_audio_serve.sampling import (
    Guidance,
    ReplayDraw,
    ReplayNoise,
    ReplayPath,
    SamplerPlan,
    SigmaRange,
    build_open_flow_plan,
    build_v_plan,
    open_flow_times,
    shift_from_config,
    start_state,
)
from stable_audio_serve.sampling.karras import polyexponential_sigmas
from tests.goldens import load_open_goldens
from tests.models.sao.tiny import TINY, load_autoencoder, load_denoiser, model_values
from tests.parameters import slow
from tests.sampling.toys import run_plan

Network = Callable[[Tensor, float], Tensor]

TOLERANCE = 5e-4
SAMPLE_RATE_HZ = 1000
SOURCE = "init/bottleneck"
CASES = [
    (name, case)
    for name in TINY
    for case, facts in load_open_goldens(name).facts["cases"].items()
    if facts["args"].get("sampler_type") != "k-dpm-adaptive"
]
SHORT = CASES[::10]  # the cases that are not slow tests; test_model.py runs all cases through the engine


def make_plan(name: str, arguments: dict[str, Any], frames: int) -> SamplerPlan:
    level, steps = arguments.get("init_noise_level"), arguments["steps"]
    guidance = Guidance(cfg_scale=arguments.get("cfg_scale", 6.0))
    has_source = level is not None
    if name == "tiny-1.0":
        span = SigmaRange(arguments.get("sigma_min", 0.01), level or arguments.get("sigma_max", 100.0))
        return build_v_plan(sampler_of(name, arguments), steps, span=span, guidance=guidance, has_source=has_source)
    shift = shift_from_config(model_values(name)["diffusion"]["distribution_shift_options"])
    sampler = sampler_of(name, arguments)
    times = open_flow_times(sampler, steps, level=level or 1.0, shift=shift, length=frames)
    return build_open_flow_plan(sampler, times, guidance=guidance, has_source=has_source)


def sampler_of(name: str, arguments: dict[str, Any]) -> str:
    sampler: str = arguments.get("sampler_type", "dpmpp-2m-sde" if name == "tiny-1.0" else "euler")
    return sampler


def make_noise(name: str, arguments: dict[str, Any], shape: tuple[int, int, int]) -> ReplayNoise:
    """Returns a noise source that draws in the reference code's order: initial noise, source encoder, sampler."""
    steps, sampler, level = arguments["steps"], sampler_of(name, arguments), arguments.get("init_noise_level")
    script: list[ReplayDraw | ReplayPath] = [ReplayDraw("initial", 0, shape)]
    if level is not None:
        script.append(ReplayDraw(SOURCE, 0, (1, *shape[1:])))
    if sampler.endswith("-sde"):
        span = SigmaRange(arguments.get("sigma_min", 0.01), level or arguments.get("sigma_max", 100.0))
        script.append(ReplayPath(tuple(polyexponential_sigmas(steps, span).tolist()), shape))
    else:
        script += [ReplayDraw("step", step, shape) for step in range(steps)]
    return ReplayNoise(arguments["seed"], script, num_rows=shape[0])


def encode_source(name: str, facts: dict[str, Any], noise: ReplayNoise) -> Tensor | None:
    """Encode the case's source clip. Returns its latents (channels, frames), or None if the case has no source."""
    inputs = facts.get("inputs")
    if not inputs:
        return None
    samples = load_open_goldens(name).tensors[inputs["init_audio"]].numpy()
    audio = prepare_source(
        SourceAudio(samples, inputs["init_rate"]),
        sample_rate_hz=SAMPLE_RATE_HZ,
        channels=2,
        num_samples=facts["args"]["sample_size"],
    )
    return load_autoencoder(name).encode(audio[None], noise.draw(SOURCE, 0))[0]


def guided_networks(
    net: Denoiser, wanted: DenoiserConditioning, other: DenoiserConditioning, *, scale: float, phi: float
) -> tuple[Network, Network]:
    """Returns functions of (x, t): the guided network, by the reference code's formula, and the unguided network."""

    def unguided(x: Tensor, t: float) -> Tensor:
        return net(x, torch.tensor([t]), conditioning=other)

    def guided(x: Tensor, t: float) -> Tensor:
        first = net(x, torch.tensor([t]), conditioning=wanted)
        if scale == 1.0:
            return first
        second = unguided(x, t)
        out = second + (first - second) * scale
        matched = out * first.std(dim=1, keepdim=True) / out.std(dim=1, keepdim=True)
        return phi * matched + (1 - phi) * out if phi else out

    return guided, unguided


@pytest.mark.parametrize(("name", "case"), [*SHORT, *starmap(slow, [case for case in CASES if case not in SHORT])])
def test_reference_run_is_reproduced(name: str, case: str) -> None:
    goldens = load_open_goldens(name)
    tensors, facts = goldens.tensors, goldens.facts["cases"][case]
    arguments, expected, net = facts["args"], tensors[f"{case}/latents"], load_denoiser(name)
    plan = make_plan(name, arguments, expected.shape[-1])
    noise = make_noise(name, arguments, tuple(expected.shape))
    source = encode_source(name, facts, noise)
    context, vectors = tensors[f"{case}/cross_attn_cond"], tensors[f"{case}/global_cond"]
    negative = tensors.get(f"{case}/negative_cross_attn_cond")
    scale, phi = arguments.get("cfg_scale", 6.0), arguments.get("scale_phi", 0.0)
    latents = []
    for row in range(len(expected)):
        one = slice(row, row + 1)
        wanted = net.condition(context[one], vectors[one])
        other = wanted.without_context() if negative is None else net.condition(negative[one], vectors[one])
        draws = noise.row(row)
        state = start_state(plan, draws.initial(tuple(expected.shape[1:])), source=source)
        guided, unguided = guided_networks(net, wanted, other, scale=scale, phi=phi)
        latents.append(run_plan(plan, state, draws, network=guided, unguided=unguided))
    torch.testing.assert_close(torch.stack(latents), expected, rtol=0, atol=TOLERANCE)
    if f"{case}/audio" in tensors:
        audio = load_autoencoder(name).decode(torch.stack(latents))
        torch.testing.assert_close(audio, tensors[f"{case}/audio"], rtol=0, atol=TOLERANCE)
