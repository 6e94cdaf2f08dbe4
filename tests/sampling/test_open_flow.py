from __future__ import annotations

import math

import pytest
import torch

from stable_audio_serve.core.errors import InvalidRequestError
from stable_audio_serve.sampling.noise import ReplayDraw, ReplayNoise
from stable_audio_serve.sampling.open_flow import build_open_flow_plan, open_flow_times
from stable_audio_serve.sampling.plan import Guidance, SamplerPlan
from stable_audio_serve.sampling.samplers import SAMPLERS, build_plan
from stable_audio_serve.sampling.schedules import shift_from_config
from stable_audio_serve.sampling.update import start_state
from stable_audio_serve.verification.samplers import flow_output
from tests.goldens import load_open_goldens
from tests.sampling.toys import run_plan

COMMON = load_open_goldens("common")
SEED = 11
TOLERANCE = 1e-6
CASES = sorted(name for name in COMMON.facts["cases"] if name.startswith("sampler/rf-"))
SCHEDULES = sorted(name for name in COMMON.facts["schedules"] if name.startswith("schedule/rf_"))
LENGTHS = (128, 256, 1024, 4096, 9999)
NO_SHIFT = shift_from_config({"type": "none"})
SHIFT = shift_from_config({"type": "full", "min_length": 256, "max_length": 4096})


def make_plan(sampler: str, steps: int, *, level: float = 1.0, guidance: Guidance = Guidance()) -> SamplerPlan:
    times = open_flow_times(sampler, steps, level=level, shift=NO_SHIFT, length=12)
    return build_open_flow_plan(sampler, times, guidance=guidance, has_source=level < 1.0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_times_match_the_reference_to_the_last_bit(name: str) -> None:
    """The last bit of a sigmoid differs between processors with and without AVX-512."""
    case = COMMON.facts["schedules"][name]
    for sampler in ("euler", "dpmpp", "pingpong"):
        times = open_flow_times(sampler, case["steps"], level=case["sigma_max"], shift=SHIFT, length=12)
        torch.testing.assert_close(times, COMMON.tensors[name], rtol=torch.finfo(torch.float32).eps, atol=0)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("kind", ["", "sine_"])
def test_shift_of_the_times_matches_the_reference(length: int, kind: str) -> None:
    options = {"type": "full", "min_length": 256, "max_length": 4096, "use_sine": bool(kind)}
    times = open_flow_times("rk4", 8, level=1.0, shift=shift_from_config(options), length=length)
    expected = COMMON.tensors[f"schedule/dist_shift_{kind}{length}"]
    torch.testing.assert_close(times, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", CASES)
def test_sampler_matches_the_reference(name: str) -> None:
    arguments = COMMON.facts["cases"][name]["args"]
    sampler, steps = arguments["sampler_type"], arguments["steps"]
    noise, expected = COMMON.tensors["sampler/noise"], COMMON.tensors[f"{name}/out"]
    source = COMMON.tensors["sampler/init"] if name.endswith("_init") else None
    shift = SHIFT if "dist_shift" in arguments else NO_SHIFT
    times = open_flow_times(sampler, steps, level=arguments.get("sigma_max", 1.0), shift=shift, length=12)
    assert times[:-1].tolist() == COMMON.facts["cases"][name]["sigma"]
    plan = build_open_flow_plan(sampler, times, guidance=Guidance(), has_source=source is not None)
    script = [ReplayDraw("step", step, tuple(noise.shape)) for step in range(steps)]
    replay = ReplayNoise(SEED, script, num_rows=len(noise))
    for row in range(len(noise)):
        state = start_state(plan, noise[row], source=None if source is None else source[row])
        result = run_plan(plan, state, replay.row(row), network=flow_output)
        torch.testing.assert_close(result, expected[row], rtol=0, atol=TOLERANCE)


def test_dpmpp_from_pure_noise_does_not_extrapolate_at_its_second_step() -> None:
    plan = make_plan("dpmpp", 6)
    earlier_weights = [evaluation.a[0][1] for evaluation in plan.evaluations]
    assert [weight != 0.0 for weight in earlier_weights] == [False, False, True, True, True, False]
    floored = build_plan(
        "dpmpp",
        open_flow_times("dpmpp", 6, level=1.0, shift=NO_SHIFT, length=12),
        guidance=Guidance(),
        has_source=False,
    )
    assert floored.evaluations[1].a[0][1] != 0.0


def test_dpmpp_survives_two_equal_times() -> None:
    times = torch.tensor([0.5, 0.5, 0.3, 0.0])
    plan = build_open_flow_plan("dpmpp", times, guidance=Guidance(), has_source=False)
    assert run_plan(plan, start_state(plan, torch.ones(2, 3)), network=flow_output).isfinite().all()


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_plan_shape(sampler: str, steps: int) -> None:
    plan = make_plan(sampler, steps)
    calls = 4 if sampler == "rk4" else 1
    assert plan.step_ends == tuple(range(calls, steps * calls + 1, calls))
    assert sum(evaluation.draws_noise for evaluation in plan.evaluations) == (steps if sampler == "pingpong" else 0)
    assert plan.num_registers <= 5
    for evaluation in plan.evaluations:
        assert evaluation.t == float(torch.tensor(evaluation.t, dtype=torch.float32))
        for weights in (*evaluation.a, evaluation.b, evaluation.b_uncond, evaluation.c):
            assert len(weights) == plan.num_registers
            assert all(map(math.isfinite, weights))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_source_is_mixed_by_the_noise_level(sampler: str) -> None:
    noise, source = torch.randn(2, 3, 5)
    state = start_state(make_plan(sampler, 3, level=0.3), noise, source=source)
    torch.testing.assert_close(state[0], 0.7 * source + 0.3 * noise)


def test_source_is_mixed_by_the_requested_level_despite_a_shift() -> None:
    noise, source = torch.randn(2, 3, 5)
    times = open_flow_times("rk4", 3, level=0.6, shift=SHIFT, length=1024)
    plan = build_open_flow_plan("rk4", times, guidance=Guidance(), has_source=True, level=0.6)
    assert plan.evaluations[0].t == float(times[0]) > 0.61
    torch.testing.assert_close(start_state(plan, noise, source=source)[0], 0.4 * source + 0.6 * noise)


@pytest.mark.parametrize(("sampler", "order", "steps"), [("euler", 1, 8), ("dpmpp", 1, 8), ("rk4", 4, 2)])
def test_order_of_convergence_on_a_linear_equation(sampler: str, order: int, steps: int) -> None:
    start = torch.tensor([[1.0, -0.4]])

    def velocity(x: torch.Tensor, t: float) -> torch.Tensor:
        """The exact velocity if the data are normal around 0 with standard deviation 0.5. Its flow halves the noise."""
        return (t - 0.25 * (1 - t)) / (0.25 * (1 - t) ** 2 + t**2) * x

    errors = []
    for num_steps in (steps, 2 * steps):
        plan = make_plan(sampler, num_steps)
        result = run_plan(plan, start_state(plan, start), network=velocity)
        errors.append(float((result - 0.5 * start).abs().max()))
    assert math.log2(errors[0] / errors[1]) > order - 0.5


def test_guidance_is_decided_by_the_time() -> None:
    plan = make_plan("rk4", 4, guidance=Guidance(cfg_scale=6.0, interval=(0.3, 0.8)))
    assert [evaluation.guided for evaluation in plan.evaluations] == [0.3 <= e.t <= 0.8 for e in plan.evaluations]


def test_step_counts_out_of_range_are_refused() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        open_flow_times("euler", 0, level=1.0, shift=NO_SHIFT, length=12)
    assert caught.value.field == "steps"


@pytest.mark.parametrize("name", ["k-heun", "k-dpm-adaptive"])
def test_other_samplers_are_refused(name: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        build_open_flow_plan(name, torch.tensor([1.0, 0.0]), guidance=Guidance(), has_source=False)
    assert caught.value.field == "sampler_type"
