from __future__ import annotations

import math

import pytest
import torch

from stable_audio_serve.core.errors import InvalidRequestError
from stable_audio_serve.sampling.brownian import ReplayPath
from stable_audio_serve.sampling.karras import SigmaRange, polyexponential_sigmas
from stable_audio_serve.sampling.noise import ReplayDraw, ReplayNoise, SeededNoise
from stable_audio_serve.sampling.plan import Guidance, SamplerPlan
from stable_audio_serve.sampling.samplers import SAMPLERS
from stable_audio_serve.sampling.update import start_state
from stable_audio_serve.sampling.v_samplers import V_SAMPLERS, build_v_plan
from stable_audio_serve.verification.samplers import v_output
from tests.goldens import load_open_goldens
from tests.sampling.toys import linear_v_velocity, run_plan

COMMON = load_open_goldens("common")
SEED = 11
CARD = SigmaRange(0.3, 500.0)
CASES = sorted(
    name
    for name, case in COMMON.facts["cases"].items()
    if name.startswith("sampler/") and case["args"]["sampler_type"] in V_SAMPLERS
)


def loosest(sampler: str) -> float:
    """Returns the allowed error of the sampler, relative to the largest value of the expected result."""
    return 1e-6 if "ddim" in sampler else 1e-3 if sampler == "k-heun" else 1e-5


def unguided(x: torch.Tensor, t: float) -> torch.Tensor:
    return 0.9 * v_output(x, t)


def run_linear(sampler: str, steps: int, span: SigmaRange, x: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Run the sampler from unit noise x (channels, frames) with the exact network for normal data. Returns the result.

    The data have mean 0 and standard deviation 0.5.
    """
    plan = build_v_plan(sampler, steps, span=span, guidance=Guidance(), has_source=False)
    return run_plan(plan, start_state(plan, x), SeededNoise(seed), network=linear_v_velocity)


@pytest.mark.parametrize("name", CASES)
def test_sampler_matches_the_reference(name: str) -> None:
    case = COMMON.facts["cases"][name]
    arguments = case["args"]
    sampler = arguments["sampler_type"]
    noise, expected = COMMON.tensors["sampler/noise"], COMMON.tensors[f"{name}/out"]
    source = COMMON.tensors["sampler/init"] if name.endswith("_init") else None
    span = SigmaRange(arguments["sigma_min"], arguments["sigma_max"])
    # v-ddim-cfgpp needs guidance, because it uses the unconditional output. `unguided` computes that output.
    guidance = Guidance(cfg_scale=2.0) if sampler == "v-ddim-cfgpp" else Guidance()
    plan = build_v_plan(sampler, arguments["steps"], span=span, guidance=guidance, has_source=source is not None)
    bound = loosest(sampler) * max(1.0, float(COMMON.tensors[f"{name}/x"].abs().max()))
    replay = ReplayNoise(SEED, make_script(sampler, arguments["steps"], span), num_rows=len(noise))
    for row in range(len(noise)):
        state = start_state(plan, noise[row], source=None if source is None else source[row])
        result = run_plan(plan, state, replay.row(row), network=v_output, unguided=unguided)
        torch.testing.assert_close(result, expected[row], rtol=0, atol=bound)


def make_script(sampler: str, steps: int, span: SigmaRange) -> list[ReplayDraw | ReplayPath]:
    shape = tuple(COMMON.tensors["sampler/noise"].shape)
    if sampler.endswith("-sde"):
        return [ReplayPath(tuple(polyexponential_sigmas(steps, span).tolist()), shape)]
    return [ReplayDraw("step", step, shape) for step in range(steps)]


@pytest.mark.parametrize(
    ("sampler", "order"),
    [
        ("dpmpp-2m", 2),
        ("k-heun", 2),
        ("k-dpm-2", 2),
        ("k-lms", 3),
        ("k-dpm-fast", 3),
        ("v-ddim", 1),
        ("v-ddim-cfgpp", 1),
    ],
)
def test_order_of_convergence_on_a_linear_equation(sampler: str, order: int) -> None:
    span = SigmaRange(1e-3, 20.0)
    start = torch.tensor([[1.0, -0.4]])
    top = span.sigma_max if "ddim" not in sampler else math.inf
    # The factor by which the exact flow multiplies unit noise.
    level = 1.0 if top == math.inf else 0.5 * top / math.sqrt(0.25 + top**2)
    exact = start * (0.5 if top == math.inf else level)
    coarse, fine = (float((run_linear(sampler, steps, span, start) - exact).abs().max()) for steps in (24, 48))
    assert math.log2(coarse / fine) > order - 0.4


@pytest.mark.parametrize("sampler", ["dpmpp-2m-sde", "dpmpp-3m-sde", "k-dpmpp-2s-ancestral"])
def test_plain_draws_give_the_distribution_of_the_data(sampler: str) -> None:
    values = run_linear(sampler, 60, SigmaRange(0.01, 80.0), SeededNoise(3).initial((1, 20_000)), seed=4)
    assert abs(float(values.std()) / 0.5 - 1.0) < 0.03
    assert abs(float(values.mean())) < 0.02


@pytest.mark.parametrize("sampler", ["dpmpp-2m-sde", "dpmpp-3m-sde"])
def test_one_step_of_a_stochastic_sampler_is_the_clean_estimate(sampler: str) -> None:
    plan = build_v_plan(sampler, 1, span=CARD, guidance=Guidance(), has_source=False)
    x = torch.randn(2, 5)
    result = run_plan(plan, start_state(plan, x), network=linear_v_velocity)
    torch.testing.assert_close(result, 500.0 * x * 0.25 / (0.25 + 500.0**2), rtol=1e-3, atol=1e-5)


def calls_per_step(plan: SamplerPlan) -> list[int]:
    return [end - start for start, end in zip((0, *plan.step_ends), plan.step_ends, strict=False)]


@pytest.mark.parametrize("sampler", V_SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 9])
def test_plan_shape(sampler: str, steps: int) -> None:
    plan = build_v_plan(sampler, steps, span=CARD, guidance=Guidance(), has_source=False)
    looks_ahead = sampler in ("k-heun", "k-dpm-2", "k-dpmpp-2s-ancestral")
    assert calls_per_step(plan) == [2] * (steps - 1) + [1] if looks_ahead else [1] * steps
    draws = [evaluation.draws_noise for evaluation in plan.evaluations]
    assert sum(draws) == (steps - 1 if "sde" in sampler or "ancestral" in sampler else 0)
    assert plan.num_registers <= 5
    for evaluation in plan.evaluations:
        assert 0.0 < evaluation.t <= 1.0
        assert evaluation.t == float(torch.tensor(evaluation.t, dtype=torch.float32))
        for weights in (*evaluation.a, evaluation.b, evaluation.b_uncond, evaluation.c):
            assert len(weights) == plan.num_registers
            assert all(map(math.isfinite, weights))


@pytest.mark.parametrize("sampler", V_SAMPLERS)
def test_a_source_is_mixed_by_its_level(sampler: str) -> None:
    plan = build_v_plan(sampler, 3, span=SigmaRange(0.1, 0.6), guidance=Guidance(), has_source=True)
    noise, source = torch.randn(2, 3, 5)
    over_time = math.cos(0.3 * math.pi) * source + math.sin(0.3 * math.pi) * noise
    expected = over_time if "ddim" in sampler else source + 0.6 * noise
    torch.testing.assert_close(start_state(plan, noise, source=source)[0], expected)


def test_guidance_is_decided_per_evaluation_over_the_share_of_noise() -> None:
    guidance = Guidance(cfg_scale=7.0, interval=(0.5, 0.8))
    plan = build_v_plan("dpmpp-2m", 30, span=CARD, guidance=guidance, has_source=False)
    for evaluation in plan.evaluations:
        share = evaluation.sigma / math.sqrt(evaluation.sigma**2 + 1)
        assert evaluation.guided == (0.5 <= share <= 0.8)
    assert 0 < sum(evaluation.guided for evaluation in plan.evaluations) < 30


def test_cfgpp_needs_one_branch_without_guidance() -> None:
    off, plain = (
        build_v_plan(sampler, 4, span=CARD, guidance=Guidance(), has_source=False)
        for sampler in ("v-ddim-cfgpp", "v-ddim")
    )
    assert off == plain


def test_v_samplers_are_not_offered_for_other_families() -> None:
    assert not set(V_SAMPLERS) & set(SAMPLERS)


def test_levels_too_close_for_the_fast_solver_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match="sigma_min and sigma_max are too close"):
        build_v_plan(
            "k-dpm-fast",
            100,
            span=SigmaRange(sigma_min=100.0, sigma_max=100.001),
            guidance=Guidance(),
            has_source=False,
        )


def test_the_adaptive_sampler_is_refused_with_a_reason() -> None:
    with pytest.raises(InvalidRequestError, match="chooses its steps from the data") as caught:
        build_v_plan("k-dpm-adaptive", 10, span=CARD, guidance=Guidance(), has_source=False)
    assert (caught.value.field, caught.value.allowed) == ("sampler_type", ", ".join(V_SAMPLERS))


@pytest.mark.parametrize("sampler", V_SAMPLERS)
def test_step_counts_out_of_range_are_refused(sampler: str) -> None:
    for steps in (0, 1001):
        with pytest.raises(InvalidRequestError) as caught:
            build_v_plan(sampler, steps, span=CARD, guidance=Guidance(), has_source=False)
        assert caught.value.field == "steps"
