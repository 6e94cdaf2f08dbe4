from __future__ import annotations

import itertools

import pytest
import torch

from stable_audio_serve.core.catalog import ModelCard
from stable_audio_serve.core.errors import InvalidRequestError
from stable_audio_serve.sampling.noise import ReplayDraw, ReplayNoise
from stable_audio_serve.sampling.plan import Guidance
from stable_audio_serve.sampling.samplers import SAMPLERS, build_plan
from stable_audio_serve.sampling.schedules import DEFAULT_SHIFT, build_sigmas
from stable_audio_serve.sampling.update import start_state
from tests.goldens import load_goldens
from tests.sampling.toys import run_plan

TOLERANCE = 1e-5
COMMON = load_goldens("common").tensors
RESULTS = sorted(key for key in COMMON if key.startswith("sampler/") and key.split("/")[1].split("_")[0] in SAMPLERS)


@pytest.mark.parametrize("key", RESULTS)
def test_sampler_matches_the_reference(key: str) -> None:
    sampler, schedule = key.removeprefix("sampler/").removesuffix("_seed5").split("_", 1)
    x0, expected = COMMON["sampler/x0"], COMMON[key]
    sigmas = COMMON[f"sampler/schedule_{schedule}"].expand(len(x0), -1)
    script = [ReplayDraw("step", step, tuple(x0.shape)) for step in range(sigmas.shape[1] - 1)]
    noise = ReplayNoise(5, script, num_rows=len(x0))
    for row, start in enumerate(x0):
        plan = build_plan(sampler, sigmas[row], guidance=Guidance(), has_source=False)
        result = run_plan(plan, start_state(plan, start), noise.row(row))
        torch.testing.assert_close(result, expected[row], rtol=0, atol=TOLERANCE)


def test_rk4_follows_each_rows_schedule() -> None:
    x0 = COMMON["sampler/x0"]
    for start, sigmas in zip(x0, COMMON["sampler/schedule_per_element"], strict=True):
        plan = build_plan("rk4", sigmas, guidance=Guidance(), has_source=False)
        fine = torch.cat([torch.linspace(a, b, 33)[:-1] for a, b in itertools.pairwise(sigmas)])
        exact = build_plan("rk4", torch.cat([fine, torch.zeros(1)]), guidance=Guidance(), has_source=False)
        torch.testing.assert_close(
            run_plan(plan, start_state(plan, start)), run_plan(exact, start_state(exact, start)), rtol=0, atol=2e-4
        )


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_plan_shape(sampler: str) -> None:
    plan = build_plan(sampler, build_sigmas(5, DEFAULT_SHIFT, length=40), guidance=Guidance(), has_source=False)
    calls = 4 if sampler == "rk4" else 1
    assert plan.step_ends == tuple(range(calls, 5 * calls + 1, calls))
    assert len(plan.evaluations) == 5 * calls
    assert plan.num_registers <= 5
    assert sum(evaluation.draws_noise for evaluation in plan.evaluations) == (5 if sampler == "pingpong" else 0)
    for evaluation in plan.evaluations:
        assert evaluation.t > 0
        assert evaluation.t == float(torch.tensor(evaluation.t, dtype=torch.float32))
        assert {len(evaluation.a), len(evaluation.b), len(evaluation.c)} == {plan.num_registers}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_source_is_mixed_by_the_noise_level(sampler: str) -> None:
    sigmas = build_sigmas(3, DEFAULT_SHIFT, length=40, sigma_max=0.3)
    plan = build_plan(sampler, sigmas, guidance=Guidance(), has_source=True)
    noise, source = torch.randn(2, 3, 5)
    torch.testing.assert_close(start_state(plan, noise, source=source)[0], 0.7 * source + 0.3 * noise)


@pytest.mark.parametrize("times", [(0.5, 0.5, 0.3, 0.0), (1.0, 0.5, 1e-11, 1e-12, 1e-13, 0.0)])
def test_dpmpp_survives_two_times_of_equal_log_snr(times: tuple[float, ...]) -> None:
    sigmas = torch.tensor(times)
    plan = build_plan("dpmpp", sigmas, guidance=Guidance(), has_source=False)
    assert run_plan(plan, start_state(plan, torch.ones(2, 3))).isfinite().all()


def test_guidance_is_decided_per_evaluation_in_float32() -> None:
    sigmas = torch.tensor([1.0, 0.9, 0.5, 0.3, 0.0])
    plan = build_plan("euler", sigmas, guidance=Guidance(cfg_scale=3.0, interval=(0.3, 0.9)), has_source=False)
    assert [evaluation.guided for evaluation in plan.evaluations] == [False, True, True, True]
    off = build_plan("euler", sigmas, guidance=Guidance(cfg_scale=1.0), has_source=False)
    assert not any(evaluation.guided for evaluation in off.evaluations)


def test_the_api_accepts_exactly_the_known_samplers() -> None:
    assert ModelCard("m", "stable-audio-3").samplers == SAMPLERS


@pytest.mark.parametrize("name", ["heun", "", "Euler", "k-dpm-adaptive"])
def test_unknown_and_data_dependent_samplers_are_refused(name: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        build_plan(name, torch.tensor([1.0, 0.0]), guidance=Guidance(), has_source=False)
    assert caught.value.field == "sampler_type"
    assert caught.value.allowed == ", ".join(SAMPLERS)
