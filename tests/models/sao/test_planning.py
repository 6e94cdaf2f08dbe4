"""How a model plans requests: generated and returned length, default values, number conditioning, refused values."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from stable_audio_serve.core.errors import InvalidRequestError
from stable_audio_serve.core.generation import GenerationRequest, SourceAudio
from stable_audio_serve.models.protocol import RowPlan
from tests.models.sao.test_model import loaded, run
from tests.models.sao.tiny import TINY
from tests.parameters import some

CLIP = SourceAudio(np.ones((2, 3000), np.float32), 1000)
HUGE = 1e300


def plans(name: str = "tiny-1.0", **fields: Any) -> tuple[RowPlan, ...]:
    return loaded(name).plan(GenerationRequest(**{"prompt": "rain", "duration_s": 2.5, "seed": 3, **fields}))


def one(name: str = "tiny-1.0", **fields: Any) -> RowPlan:
    (plan,) = plans(name, **fields)
    return plan


@pytest.mark.parametrize(("name", "frames"), [("tiny-1.0", 743), ("tiny-small", 186)])
@pytest.mark.parametrize("duration_s", [0.0005, 2.5, 11.9])
def test_the_window_is_whole_for_any_clip_length(name: str, frames: int, duration_s: float) -> None:
    plan = one(name, duration_s=duration_s)
    assert (plan.frames, plan.valid_frames) == (frames, frames)
    assert plan.output_samples == max(int(duration_s * 1000), 1)


def test_variations_differ_in_their_seed_only() -> None:
    first, second = plans(batch_size=2)
    assert (first.seed, second.seed) == (3, 4)
    assert first.sampler is second.sampler


@pytest.mark.parametrize(
    ("fields", "start", "total"),
    [
        ({}, 0.0, 2.5),
        ({"start_s": 4.0}, 4.0, 6.5),
        ({"conditioned_total_s": 12.0}, 0.0, 12.0),
        ({"start_s": 4.0, "conditioned_total_s": 12.0}, 4.0, 12.0),
    ],
)
def test_seconds_of_the_prompt(fields: dict[str, Any], start: float, total: float) -> None:
    plan = one(**fields)
    assert plan.numbers == {"seconds_start": start, "seconds_total": total}
    assert plan.negative_numbers == plan.numbers
    assert plan.output_samples == 2500


def test_seconds_of_the_negative_prompt() -> None:
    plan = one(negative_prompt="noise", negative_total_s=30.0)
    assert plan.negative_numbers == {"seconds_start": 0.0, "seconds_total": 30.0}
    assert plan.numbers["seconds_total"] == 2.5


@pytest.mark.parametrize(
    ("name", "number", "most"), [("tiny-1.0", "seconds_start", 512.0), (TINY[1], "seconds_total", 256.0)]
)
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_seconds_are_clamped_to_their_range(name: str, number: str, most: float, sign: float) -> None:
    conditioner = loaded(name).numbers[number]
    nearest = torch.tensor([most if sign > 0 else 0.0])
    assert torch.equal(conditioner(torch.tensor([sign * HUGE])), conditioner(nearest))


def test_a_negative_prompt_is_only_for_guided_rows() -> None:
    assert one(negative_prompt="noise", cfg_scale=1.0).negative_prompt is None
    assert one(negative_prompt=" ", cfg_scale=4.0).negative_prompt is None
    assert one(negative_prompt="noise", cfg_scale=4.0).negative_prompt == "noise"


@pytest.mark.parametrize("name", TINY)
def test_sources_cover_the_window(name: str) -> None:
    source = one(name, init_audio=CLIP, init_noise_level=1.0).init_source
    assert source is not None
    assert source.samples.shape == (2, one(name).frames * 64)
    assert torch.equal(source.samples[:, :3000], torch.ones(2, 3000))
    assert not source.samples[:, 3000:].any()


def decoded(plan: RowPlan) -> list[int]:
    return [span.stop - span.start for span in plan.decode_windows]


@pytest.mark.parametrize(
    ("duration_s", "lengths"), [(0.001, [16]), (2.5, [64]), (6.0, [112]), (11.0, [192]), (47.552, [384, 384])]
)
def test_only_the_audible_part_is_decoded(duration_s: float, lengths: list[int]) -> None:
    plan = one(duration_s=duration_s)
    assert decoded(plan) == lengths
    assert decoded(one(duration_s=duration_s, chunked_decode=True)) == lengths
    assert decoded(one(duration_s=duration_s, chunked_decode=False)) == [743]
    kept = [frame for span in plan.decode_windows for frame in range(span.keep_start, span.keep_stop)]
    assert kept == list(range(len(kept)))
    assert len(kept) * 64 >= plan.output_samples


@pytest.mark.parametrize(
    ("name", "duration_s"),
    some(product(TINY, (0.5, 6.3, 11.8)), [("tiny-1.0", 0.5), ("tiny-1.0", 11.8), ("tiny-small", 6.3)]),
)
def test_a_clip_is_the_beginning_of_the_windows_audio(name: str, duration_s: float) -> None:
    model = loaded(name)
    request = GenerationRequest(prompt="rain", duration_s=duration_s, seed=1, steps=1, cfg_scale=1.0)
    (clip,) = run(model, [request])
    (window,) = run(
        model, [replace(request, duration_s=model.spec.card.max_duration_s, conditioned_total_s=duration_s)]
    )
    assert clip.shape[1] == int(duration_s * 1000)
    np.testing.assert_allclose(clip, window[:, : clip.shape[1]], rtol=0, atol=2e-5)


@pytest.mark.parametrize("sampler", ["euler", "rk4", "dpmpp", "pingpong"])
@pytest.mark.parametrize("schedule", ["reference", "scaled", "even"])
def test_an_edit_of_a_flow_model_has_the_requested_noise(sampler: str, schedule: str) -> None:
    (plan,) = plans(
        "tiny-small", sampler=sampler, init_audio=CLIP, init_noise_level=0.6, edit_schedule=schedule, steps=4
    )
    assert plan.sampler.noise_scale == pytest.approx(0.6)
    assert plan.sampler.source_scale == pytest.approx(0.4)


@pytest.mark.parametrize("sampler", ["euler", "rk4", "dpmpp", "pingpong"])
def test_an_edit_of_a_flow_model_has_the_references_times(sampler: str) -> None:
    edit = {"sampler": sampler, "init_audio": CLIP, "init_noise_level": 0.4, "steps": 8}
    own, reference = one("tiny-small", **edit), one("tiny-small", **edit, edit_schedule="reference")
    assert own.sampler == reference.sampler
    if sampler != "rk4":  # expected: evenly spaced log-SNR, from the log-SNR of the level 0.4 to 2
        expected = torch.sigmoid(-torch.linspace(math.log(0.6 / 0.4), 2, 9)[1:-1])
        times = torch.tensor([evaluation.t for evaluation in own.sampler.evaluations[1:]])
        torch.testing.assert_close(times, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("level", [0.00011, 0.1, 0.4, 1.0, 80.0])
def test_an_edit_of_a_v_model_starts_at_its_own_level(level: float) -> None:
    sampler = one(init_audio=CLIP, init_noise_level=level, sampler="k-heun", steps=4).sampler
    assert sampler.evaluations[0].sigma == pytest.approx(level)
    assert all(
        late.sigma <= early.sigma * (1 + 1e-6)
        for early, late in zip(sampler.evaluations, sampler.evaluations[1:], strict=False)
    )


@pytest.mark.parametrize(
    ("name", "field", "fields"),
    [
        ("tiny-1.0", "duration", {"duration_s": 0.0}),
        ("tiny-1.0", "duration", {"duration_s": 47.6}),
        ("tiny-1.0", "duration", {"duration_s": math.nan}),
        ("tiny-1.0", "seconds_start", {"start_s": math.inf}),
        ("tiny-1.0", "seconds_total", {"conditioned_total_s": math.nan}),
        ("tiny-1.0", "negative_seconds_start", {"negative_start_s": math.nan}),
        ("tiny-1.0", "negative_seconds_total", {"negative_total_s": math.inf}),
        ("tiny-1.0", "sampler_type", {"sampler": "k-dpm-adaptive"}),
        ("tiny-1.0", "sampler_type", {"sampler": "pingpong"}),
        ("tiny-1.0", "steps", {"steps": 0}),
        ("tiny-1.0", "sigma_max", {"sigma_max": math.nan}),
        ("tiny-1.0", "sigma_max", {"sigma_max": -1.0}),
        ("tiny-1.0", "sigma_max", {"sigma_max": 0.0}),
        ("tiny-1.0", "sigma_min", {"sigma_min": math.nan}),
        ("tiny-1.0", "sigma_max", {"sigma_min": 5.0, "sigma_max": 5.0}),
        ("tiny-1.0", "rho", {"rho": 0.0}),
        ("tiny-1.0", "init_noise_level", {"init_audio": CLIP, "init_noise_level": 0.0}),
        ("tiny-1.0", "init_noise_level", {"init_audio": CLIP, "init_noise_level": math.nan}),
        ("tiny-1.0", "init_noise_level", {"init_audio": CLIP, "init_noise_level": 1.5, "sampler": "v-ddim"}),
        ("tiny-1.0", "sigma_min", {"init_audio": CLIP, "init_noise_level": 1.0, "sigma_min": 2.0}),
        ("tiny-1.0", "edit_schedule", {"edit_schedule": "scaled"}),
        ("tiny-1.0", "apg_scale", {"apg_scale": 1.0}),
        ("tiny-1.0", "cfg_norm_threshold", {"cfg_norm_threshold": 1.0}),
        ("tiny-small", "duration", {"duration_s": 11.91}),
        ("tiny-small", "sampler_type", {"sampler": "dpmpp-3m-sde"}),
        ("tiny-small", "sigma_max", {"sigma_max": math.nan}),
        ("tiny-small", "sigma_max", {"sigma_max": -1.0}),
        ("tiny-small", "init_noise_level", {"init_audio": CLIP, "init_noise_level": 1.5}),
        ("tiny-small", "init_noise_level", {"init_audio": CLIP, "init_noise_level": -0.1}),
        ("tiny-small", "init_noise_level", {"init_audio": CLIP, "init_noise_level": math.nan}),
    ],
)
def test_invalid_values_are_refused_by_field(name: str, field: str, fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        plans(name, **fields)
    assert caught.value.field == field
