from __future__ import annotations

from typing import Any

import pytest
import torch

from stable_audio_serve.core.errors import CheckpointError, InvalidRequestError
from stable_audio_serve.core.generation import ScheduleShift
from stable_audio_serve.sampling import DEFAULT_SHIFT, build_sigmas, shift_from_config, shift_from_override
from tests.goldens import SHARP, load_goldens

TOLERANCE = 1e-6
CASES = [("common", case) for case in load_goldens("common").facts["schedules"]] + [
    (name, case) for name in SHARP for case in load_goldens(name).facts["components"]["schedules"]
]


@pytest.mark.parametrize(("folder", "case"), CASES, ids=[f"{folder}-{case['name']}" for folder, case in CASES])
def test_schedule_matches_the_reference(folder: str, case: dict[str, Any]) -> None:
    shift = shift_from_config(case["shift"] or {"type": "none"})
    lengths = case["seq_len"] if isinstance(case["seq_len"], list) else [case["seq_len"]]
    expected = torch.tensor(case["values"])
    if expected.dim() == 1:
        expected = expected.expand(len(lengths), -1)
    for length, values in zip(lengths, expected, strict=True):
        sigmas = build_sigmas(case["steps"], shift, length=length, sigma_max=case["sigma_max"])
        assert sigmas.dtype == torch.float32
        torch.testing.assert_close(sigmas, values, rtol=0, atol=TOLERANCE)


def test_config_without_options_gives_the_length_free_default() -> None:
    assert shift_from_config(None) == DEFAULT_SHIFT
    short, long = (build_sigmas(8, DEFAULT_SHIFT, length=length) for length in (1, 4000))
    assert torch.equal(short, long)


def test_config_options_without_a_type_mean_full() -> None:
    assert shift_from_config({"max_shift": 2}) == shift_from_config({"type": "full", "max_shift": 2})


def test_override_equals_the_same_config_options() -> None:
    override = ScheduleShift("flux", (("alpha_min", 2.0), ("alpha_max", 3.0)))
    assert shift_from_override(override) == shift_from_config({"type": "flux", "alpha_min": 2, "alpha_max": 3})


@pytest.mark.parametrize(
    "options",
    [
        {"type": "cosine"},
        {"type": "flux", "base_shift": 1},
        {"type": "flux", "alpha_min": 0},
        {"type": "full", "min_length": 10, "max_length": 10},
        {"type": "logsnr", "rate": "fast"},
        {"type": "logsnr", "rate": float("nan")},
        {"type": "logsnr", "anchor_length": 0},
        [1, 2],
    ],
    ids=str,
)
def test_unusable_options_are_refused_by_key(options: Any) -> None:
    with pytest.raises(CheckpointError, match="sampling_distribution_shift_options"):
        shift_from_config(options)
    if isinstance(options, dict):
        kind = options["type"]
        override = ScheduleShift(kind, tuple((key, value) for key, value in options.items() if key != "type"))
        with pytest.raises(InvalidRequestError) as caught:
            shift_from_override(override)
        assert caught.value.field == "schedule_shift"


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_step_counts_out_of_range_are_refused(steps: int) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        build_sigmas(steps, DEFAULT_SHIFT, length=10)
    assert caught.value.field == "steps"


@pytest.mark.parametrize("level", [0.0, 0.009, 1.01, float("nan")])
def test_noise_levels_out_of_range_are_refused(level: float) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        build_sigmas(4, DEFAULT_SHIFT, length=10, sigma_max=level)
    assert caught.value.field == "init_noise_level"


def test_a_shift_that_reaches_zero_early_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="above 0"):
        build_sigmas(8, shift_from_config({"type": "logsnr", "logsnr_end": 1e4}), length=10)
