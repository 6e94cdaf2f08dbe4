from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stable_audio_serve.sampling.blend import blend_plan, flow_path
from stable_audio_serve.sampling.karras import SigmaRange
from stable_audio_serve.sampling.plan import Guidance
from stable_audio_serve.sampling.samplers import SAMPLERS, build_plan
from stable_audio_serve.sampling.schedules import DEFAULT_SHIFT, build_sigmas
from stable_audio_serve.sampling.update import Kept, StepTerms, advance, network_input
from stable_audio_serve.sampling.v_samplers import V_SAMPLERS, build_v_plan, v_path

CHANNELS, FRAMES = 3, 7


def make_plan(sampler: str, steps: int):
    guidance = Guidance(cfg_scale=3.0)
    if sampler in V_SAMPLERS:
        return build_v_plan(sampler, steps, span=SigmaRange(0.3, 500.0), guidance=guidance, has_source=False)
    return build_plan(sampler, build_sigmas(steps, DEFAULT_SHIFT, length=30), guidance=guidance, has_source=False)


@st.composite
def rows_in_flight(draw: st.DrawFn):
    sampler = draw(st.sampled_from(SAMPLERS + V_SAMPLERS))
    plan = make_plan(sampler, draw(st.integers(1, 6)))
    if draw(st.booleans()):
        plan = blend_plan(plan, v_path(sampler) if sampler in V_SAMPLERS else flow_path)
    return plan, draw(st.integers(0, len(plan.evaluations) - 1))


@given(rows=st.lists(rows_in_flight(), min_size=1, max_size=6), seed=st.integers(0, 2**20))
def test_a_row_in_a_batch_equals_the_row_alone_bit_for_bit(rows, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    width = max(plan.num_registers for plan, _ in rows)
    state = torch.randn(len(rows), width, CHANNELS, FRAMES, generator=generator)
    for index, (plan, _) in enumerate(rows):
        state[index, plan.num_registers :] = 0.0
    velocity, unconditional, noise = torch.randn(3, len(rows), CHANNELS, FRAMES, generator=generator)
    kept = Kept(
        mask=torch.rand(len(rows), FRAMES, generator=generator) < 0.5,
        source=torch.randn(len(rows), CHANNELS, FRAMES, generator=generator),
        noise=torch.randn(len(rows), CHANNELS, FRAMES, generator=generator),
    )
    for index, (plan, _) in enumerate(rows):
        if plan.start_blend is None:
            kept.source[index] = float("nan")  # this row has no kept frames, so its source must not matter
    evaluations = [plan.evaluations[at] for plan, at in rows]
    together = advance(
        state, StepTerms.of(evaluations), velocity=velocity, unconditional=unconditional, noise=noise, kept=kept
    )
    inputs = network_input(state, StepTerms.of(evaluations))
    for index, (plan, _) in enumerate(rows):
        own = state[index : index + 1, : plan.num_registers]
        one = slice(index, index + 1)
        outputs = {"velocity": velocity[one], "unconditional": unconditional[one], "noise": noise[one]}
        own_kept = Kept(kept.mask[one], kept.source[one], kept.noise[one]) if plan.start_blend else None
        alone = advance(own, StepTerms.of(evaluations[one]), **outputs, kept=own_kept)
        assert alone.numpy().tobytes() == together[one, : plan.num_registers].contiguous().numpy().tobytes()
        assert not together[index, plan.num_registers :].any()
        assert torch.equal(network_input(own, StepTerms.of(evaluations[one])), inputs[one])


def test_nan_of_neighbours_and_unused_terms_does_not_spread() -> None:
    euler, pingpong = make_plan("euler", 2).evaluations[0], make_plan("pingpong", 2).evaluations[0]
    last = make_plan("pingpong", 2).evaluations[-1]
    state = torch.ones(3, 1, CHANNELS, FRAMES)
    state[1] = float("nan")
    noise = torch.full((3, CHANNELS, FRAMES), float("nan"))
    result = advance(
        state, StepTerms.of([euler, pingpong, last]), velocity=torch.ones(3, CHANNELS, FRAMES), noise=noise
    )
    assert result[0].isfinite().all()
    assert result[1].isnan().all()
    assert result[2].isfinite().all()  # in the last step of ping-pong, noise has the coefficient 0


def test_a_missing_term_that_is_needed_is_an_error() -> None:
    pingpong = make_plan("pingpong", 2).evaluations[0]
    with pytest.raises(ValueError, match="noise"):
        advance(torch.ones(1, 1, 2, 2), StepTerms.of([pingpong]), velocity=torch.ones(1, 2, 2))
