"""The number of network calls that prices assume for each sampler equals the number in the sampler's plans."""

from __future__ import annotations

import pytest
import torch

from stable_audio_serve.core.pricing import EVALUATIONS_PER_STEP
from stable_audio_serve.sampling.karras import SigmaRange
from stable_audio_serve.sampling.plan import Guidance
from stable_audio_serve.sampling.samplers import SAMPLERS, build_plan
from stable_audio_serve.sampling.v_samplers import V_SAMPLERS, build_v_plan


@pytest.mark.parametrize("sampler", dict.fromkeys([*SAMPLERS, *V_SAMPLERS]))
@pytest.mark.parametrize("steps", [8, 100])
def test_prices_count_a_samplers_network_calls(sampler: str, steps: int) -> None:
    if sampler in V_SAMPLERS:
        plan = build_v_plan(sampler, steps, span=SigmaRange(0.3, 500.0), guidance=Guidance(), has_source=False)
    else:
        plan = build_plan(sampler, torch.linspace(1, 0, steps + 1), guidance=Guidance(), has_source=False)
    per_step = EVALUATIONS_PER_STEP.get(sampler, 1)
    assert (steps - 1) * per_step < len(plan.evaluations) <= steps * per_step  # the last step may have fewer calls


def test_prices_cover_exactly_the_known_samplers() -> None:
    assert EVALUATIONS_PER_STEP.keys() <= {*SAMPLERS, *V_SAMPLERS}
