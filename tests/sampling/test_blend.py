from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from stable_audio_serve.sampling.blend import angle_path, blend_plan, flow_path, sigma_path
from stable_audio_serve.sampling.karras import SigmaRange
from stable_audio_serve.sampling.noise import SeededNoise
from stable_audio_serve.sampling.open_flow import build_open_flow_plan, open_flow_times
from stable_audio_serve.sampling.plan import LATENTS, Guidance, SamplerPlan
from stable_audio_serve.sampling.samplers import SAMPLERS, build_plan
from stable_audio_serve.sampling.schedules import DEFAULT_SHIFT
from stable_audio_serve.sampling.update import Kept, StepTerms, advance, network_input, start_state
from stable_audio_serve.sampling.v_samplers import V_SAMPLERS, build_v_plan, v_path
from tests.parameters import slow

CHANNELS, FRAMES = 3, 12
CASES = [*(("v", name) for name in V_SAMPLERS), *(("open", name) for name in SAMPLERS)]
CASES += [("stable-audio-3", name) for name in SAMPLERS]
CORRELATION = 0.8


def make_plan(family: str, sampler: str, steps: int = 5, *, has_source: bool = False) -> SamplerPlan:
    guidance = Guidance(cfg_scale=2.0)
    if family == "v":
        span = SigmaRange(0.3, 80.0) if "ddim" not in sampler else SigmaRange(0.3, 1.0)
        return build_v_plan(sampler, steps, span=span, guidance=guidance, has_source=has_source)
    level = 0.6 if has_source else 1.0
    if family == "open":
        times = open_flow_times(sampler, steps, level=level, shift=DEFAULT_SHIFT, length=FRAMES)
        return build_open_flow_plan(sampler, times, guidance=guidance, has_source=has_source)
    return build_plan(sampler, torch.linspace(level, 0, steps + 1), guidance=guidance, has_source=has_source)


def blend(plan: SamplerPlan, family: str, sampler: str) -> SamplerPlan:
    return blend_plan(plan, v_path(sampler) if family == "v" else flow_path)


def make_kept(mask: Tensor | None = None) -> Kept:
    source, noise = torch.randn(2, CHANNELS, FRAMES, generator=torch.Generator().manual_seed(3))
    return Kept(mask=torch.arange(FRAMES) % 3 == 0 if mask is None else mask, source=source, noise=noise)


def mixing_network(x: Tensor, t: float) -> Tensor:
    """A toy network whose output at each frame depends on all frames."""
    return 0.5 * x + 0.2 * torch.sin(x.mean(dim=-1, keepdim=True) + t)


def run(
    plan: SamplerPlan,
    kept: Kept | None,
    *,
    network: Callable[[Tensor, float], Tensor] = mixing_network,
    before: Callable[[Tensor, int], Tensor] = lambda state, index: state,
) -> Tensor:
    """Run a plan for one row with fixed noise. Returns the result (channels, frames).

    `before(state, index)` returns the state to use for evaluation `index`, so it may change the state.
    """
    noise = SeededNoise(8)
    shape = (CHANNELS, FRAMES) if kept is None else tuple(kept.source.shape)
    source = torch.full(shape, 0.4)
    state = start_state(plan, noise.initial(shape), source=source if plan.source_scale else None, kept=kept)[None]
    batch = None if kept is None else Kept(kept.mask[None], kept.source[None], kept.noise[None])
    for index, evaluation in enumerate(plan.evaluations):
        state = before(state, index)
        x = network_input(state, StepTerms.of([evaluation]))
        drawn = noise.step(shape)[None] if evaluation.draws_noise else None
        v = network(x, evaluation.t)
        state = advance(state, StepTerms.of([evaluation]), velocity=v, unconditional=0.9 * v, noise=drawn, kept=batch)
    return state[0, LATENTS]


@pytest.mark.parametrize("has_source", [False, True])
@pytest.mark.parametrize(("family", "sampler"), CASES)
def test_the_network_sees_kept_frames_at_the_current_noise_level(family: str, sampler: str, has_source: bool) -> None:
    kept = make_kept()
    plan = blend(make_plan(family, sampler, has_source=has_source), family, sampler)

    def check(state: Tensor, index: int) -> Tensor:
        evaluation = plan.evaluations[index]
        angle = evaluation.t * math.pi / 2
        shares = (math.cos(angle), math.sin(angle)) if family == "v" else (1 - evaluation.t, evaluation.t)
        expected = shares[0] * kept.source + shares[1] * kept.noise
        seen = network_input(state, StepTerms.of([evaluation]))[0]
        torch.testing.assert_close(seen[:, kept.mask], expected[:, kept.mask], rtol=0, atol=1e-5)
        return state

    result = run(plan, kept, before=check)
    assert torch.equal(result[:, kept.mask], kept.source[:, kept.mask])
    moved = (result - kept.source)[:, ~kept.mask].abs() > 1e-3
    assert moved.float().mean() > 0.9


@pytest.mark.parametrize(("family", "sampler"), CASES)
def test_keeping_nothing_equals_text_to_audio_bit_for_bit(family: str, sampler: str) -> None:
    plan = make_plan(family, sampler)
    nothing = make_kept(torch.zeros(FRAMES, dtype=torch.bool))
    result = run(blend(plan, family, sampler), nothing)
    assert result.numpy().tobytes() == run(plan, None).numpy().tobytes()


@pytest.mark.parametrize(("family", "sampler"), CASES)
def test_keeping_everything_returns_the_source(family: str, sampler: str) -> None:
    everything = make_kept(torch.ones(FRAMES, dtype=torch.bool))
    plan = blend(make_plan(family, sampler), family, sampler)
    result = run(plan, everything, network=lambda x, _: torch.full_like(x, float("nan")))
    assert torch.equal(result, everything.source)


@pytest.mark.parametrize(("family", "sampler"), CASES)
def test_kept_frames_of_registers_that_are_not_blended_do_not_matter(family: str, sampler: str) -> None:
    """Only the register that the network reads next must have the right values in the kept frames."""
    kept = make_kept()
    plan = blend(make_plan(family, sampler, 7), family, sampler)

    def scramble(state: Tensor, index: int) -> Tensor:
        state = state.clone()
        for register in range(plan.num_registers):
            if register != plan.evaluations[index].input_register:
                state[:, register, :, kept.mask] += 3.0
        return state

    assert torch.equal(run(plan, kept, before=scramble), run(plan, kept))


def test_the_last_blend_needs_no_noise() -> None:
    kept = replace(make_kept(), noise=torch.full((CHANNELS, FRAMES), float("nan")))
    last = blend(make_plan("v", "k-dpm-fast"), "v", "k-dpm-fast").evaluations[-1]
    batch = Kept(kept.mask[None], kept.source[None], kept.noise[None])
    zeros = torch.zeros(1, 3, CHANNELS, FRAMES)
    moved = advance(zeros, StepTerms.of([last]), velocity=zeros[:, 0], unconditional=zeros[:, 0], kept=batch)
    assert moved.isfinite().all()


def test_a_blend_without_a_source_is_an_error() -> None:
    plan = blend(make_plan("open", "euler"), "open", "euler")
    with pytest.raises(ValueError, match="blend"):
        start_state(plan, torch.ones(CHANNELS, FRAMES))
    zeros = torch.zeros(1, 1, CHANNELS, FRAMES)
    with pytest.raises(ValueError, match="blend"):
        advance(zeros, StepTerms.of(plan.evaluations[:1]), velocity=zeros[:, 0], unconditional=zeros[:, 0])


def make_pairs(z: Tensor, noise: Tensor) -> Kept:
    """Returns a `Kept` for clips of two frames.

    The first frame is kept. Its source is `z` (channels,), and its noise is `noise` (channels,).
    """
    return Kept(mask=torch.tensor([True, False]), source=z[:, None].repeat(1, 2), noise=noise[:, None].repeat(1, 2))


def pair_velocity(x: Tensor, alpha: float, beta: float, *, flow: bool) -> Tensor:
    """Returns the exact network output at x (batch, channels, 2), if the data are two normal frames (see below).

    The two frames have unit variance and the correlation `CORRELATION`. `alpha` and `beta` are the weights of data and
    noise in x.
    """
    covariance = torch.tensor([[1.0, CORRELATION], [CORRELATION, 1.0]], dtype=torch.float64)
    noisy = alpha**2 * covariance + beta**2 * torch.eye(2, dtype=torch.float64)
    clean = x.double() @ (alpha * covariance @ torch.linalg.inv(noisy))
    noise = (x.double() - alpha * clean) / beta
    return (noise - clean if flow else alpha * noise - beta * clean).float()


def pair_network(*, flow: bool) -> Callable[[Tensor, float], Tensor]:
    def network(x: Tensor, t: float) -> Tensor:
        alpha, beta = (1.0 - t, t) if flow else (math.cos(math.pi * t / 2), math.sin(math.pi * t / 2))
        return pair_velocity(x, alpha, beta, flow=flow)

    return network


def next_to_kept(kept: Kept, start: Tensor, *, sigma: float, pull: float) -> Tensor:
    """Returns the expected second frame at noise level 0.

    The kept first frame has the source z and the noise eps'. At each level sigma, it is z + sigma eps'. The second
    frame x begins as sigma times `start`. Let r be the correlation, u = 1 + sigma^2 and w = u^2 - r^2. Then the
    derivative (x - D(x)) / sigma, where D is the exact denoiser, is x sigma u / w - r sigma (z + sigma eps') / w. With
    the derivative multiplied by `pull`, the differential equation has the homogeneous solution w^(pull / 4). `pull` is
    1 for the probability flow and 2 for the reverse diffusion, which also adds noise.
    """
    levels = torch.logspace(-6, math.log10(sigma), 40_001, dtype=torch.float64)
    w = (1 + levels**2) ** 2 - CORRELATION**2
    along = pull * levels * CORRELATION / w ** (1 + pull / 4)
    z, noise = kept.source[:, 0].double(), kept.noise[:, 0].double()
    pulled = z * torch.trapezoid(along, levels) + noise * torch.trapezoid(along * levels, levels)
    return (1 - CORRELATION**2) ** (pull / 4) * (start.double() * sigma / w[-1] ** (pull / 4) + pulled)


@pytest.mark.parametrize(
    ("family", "sampler", "steps", "tolerance"),
    [
        ("v", "dpmpp-2m", 200, 2e-3),
        slow("v", "k-heun", 200, 2e-3),
        slow("v", "k-dpm-2", 200, 2e-3),
        ("v", "k-lms", 200, 2e-3),
        slow("v", "k-dpm-fast", 200, 2e-3),
        slow("v", "v-ddim", 1000, 5e-3),
        ("stable-audio-3", "euler", 1000, 5e-3),
        ("stable-audio-3", "rk4", 100, 2e-3),
        ("stable-audio-3", "dpmpp", 500, 5e-3),
    ],
)
def test_deterministic_samplers_follow_the_exact_flow_next_to_kept(
    family: str, sampler: str, steps: int, tolerance: float
) -> None:
    flow = family != "v"
    guidance, span = Guidance(), SigmaRange(1e-3, 80.0) if "ddim" not in sampler else SigmaRange(1e-3, 1.0)
    if family == "v":
        plan = build_v_plan(sampler, steps, span=span, guidance=guidance, has_source=False)
    else:
        plan = build_plan(sampler, torch.linspace(1, 0, steps + 1), guidance=guidance, has_source=False)
    kept = make_pairs(*torch.randn(2, 64, generator=torch.Generator().manual_seed(5)))
    result = run(blend(plan, family, sampler), kept, network=pair_network(flow=flow))
    top = 80.0 if plan.noise_scale != 1.0 else 1e4
    expected = next_to_kept(kept, SeededNoise(8).initial((64, 2))[:, 1], sigma=top, pull=1.0)
    assert torch.equal(result[:, 0], kept.source[:, 0])
    torch.testing.assert_close(result[:, 1].double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("sampler", [slow("dpmpp-2m-sde"), "dpmpp-3m-sde", slow("k-dpmpp-2s-ancestral")])
def test_stochastic_samplers_follow_the_exact_diffusion_next_to_kept(sampler: str) -> None:
    span = SigmaRange(0.01, 80.0)
    plan = build_v_plan(sampler, 150, span=span, guidance=Guidance(), has_source=False)
    num = 20_000
    kept = make_pairs(torch.full((num,), 1.5), torch.full((num,), -0.7))
    made = run(blend_plan(plan, sigma_path), kept, network=pair_network(flow=False))[:, 1].double()
    expected = next_to_kept(kept, torch.zeros(num), sigma=80.0, pull=2.0)[0]
    variance = (1 - CORRELATION**2) / (2 * CORRELATION) * math.log((1 + CORRELATION) / (1 - CORRELATION))
    assert float(made.mean()) == pytest.approx(float(expected), abs=0.03)
    assert float(made.std()) == pytest.approx(math.sqrt(variance), rel=0.03)


def test_pingpong_generates_towards_the_kept_frames() -> None:
    """The second frame's expected value, given the first, is 0.8 of the first. Ping-pong sampling converges to it."""
    plan = build_plan("pingpong", torch.linspace(1, 0, 101), guidance=Guidance(), has_source=False)
    kept = make_pairs(torch.full((5_000,), 1.5), torch.randn(5_000, generator=torch.Generator().manual_seed(6)))
    made = run(blend_plan(plan, flow_path), kept, network=pair_network(flow=True))[:, 1]
    assert 0.9 < float(made.mean()) / (1.5 * CORRELATION) < 1.0
    assert 0.4 < float(made.std()) < 0.6


def test_variance_preserving_paths_keep_unit_variance() -> None:
    evaluation = replace(make_plan("open", "euler").evaluations[0], t=0.3, sigma=2.0)
    assert sigma_path(evaluation) == (1.0, 2.0)
    assert flow_path(evaluation) == (0.7, 0.3)
    assert math.hypot(*angle_path(evaluation)) == pytest.approx(1.0)
