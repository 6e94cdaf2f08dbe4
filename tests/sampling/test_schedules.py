from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch

from stable_audio_serve.core.errors import CheckpointError, InvalidRequestError
from stable_audio_serve.core.generation import EditSchedule
from stable_audio_serve.sampling.schedules import DEFAULT_SHIFT, build_sigmas, edit_times, shift_from_config
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


def test_config_without_options_gives_the_default_shift() -> None:
    assert shift_from_config(None) == DEFAULT_SHIFT
    short, long = (build_sigmas(8, DEFAULT_SHIFT, length=length) for length in (1, 4000))
    assert torch.equal(short, long)


def test_config_options_without_a_type_mean_full() -> None:
    assert shift_from_config({"max_shift": 2}) == shift_from_config({"type": "full", "max_shift": 2})


@pytest.mark.parametrize("options", [{"base_shift": 1000}, {"max_shift": -1000}, {"type": "logsnr", "rate": 1e30}])
def test_config_options_without_usable_levels_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="sampling_distribution_shift_options: not all noise levels"):
        shift_from_config(options)


def test_config_options_that_overflow_are_refused() -> None:
    with pytest.raises(CheckpointError, match="max_length must be a number"):
        shift_from_config({"max_length": 1e308})


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


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_step_counts_out_of_range_are_refused(steps: int) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        build_sigmas(steps, DEFAULT_SHIFT, length=10)
    assert caught.value.field == "steps"


@pytest.mark.parametrize("level", [0.01, 0.1, 0.4, 0.69, 0.9, 1.0])
@pytest.mark.parametrize("steps", [1, 8, 50])
def test_a_scaled_schedule_never_rises_above_the_level_of_its_edit(level: float, steps: int) -> None:
    def build(start: float) -> torch.Tensor:
        return build_sigmas(steps, DEFAULT_SHIFT, length=40, sigma_max=start)

    scaled, whole = edit_times(build, level, schedule="scaled"), build(1.0)
    torch.testing.assert_close(scaled / level, whole, rtol=1e-6, atol=0)
    assert scaled[0] == torch.tensor(level)
    assert (scaled[1:] <= scaled[:-1]).all()
    assert torch.equal(edit_times(build, level, schedule="reference"), build(level))
    if steps == 8 and level == 0.4:  # an example in which the reference's schedule differs
        assert build(level)[1:].max() > 1.5 * level


@pytest.mark.parametrize("level", [0.01, 0.1, 0.25, 0.69, 0.999])
@pytest.mark.parametrize("steps", [1, 8, 50, 1000])
def test_an_even_schedule_has_equal_steps_of_log_snr(level: float, steps: int) -> None:
    def build(start: float) -> torch.Tensor:
        return build_sigmas(steps, DEFAULT_SHIFT, length=40, sigma_max=start)

    times = edit_times(build, level, schedule="even")
    assert (times[0], times[-1]) == (torch.tensor(level), 0.0)
    assert (times[1:] < times[:-1]).all()
    log_snr = torch.log((1 - times[:-1].double()) / times[:-1].double())
    end = math.log(1 / (level / (1 + math.exp(2.0))) - 1)  # the log-SNR of the noise level `level` * sigmoid(-2)
    expected = torch.linspace(math.log(1 / level - 1), end, steps + 1, dtype=torch.float64)[:-1]
    torch.testing.assert_close(log_snr, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("schedule", get_args(EditSchedule))
def test_an_edit_at_full_noise_has_the_times_of_text_to_audio(schedule: EditSchedule) -> None:
    times = build_sigmas(8, DEFAULT_SHIFT, length=40)
    assert torch.equal(edit_times(lambda _: times, 1.0, schedule=schedule), times)


def test_more_steps_than_the_shift_has_levels_for_are_refused() -> None:
    shift = shift_from_config({"type": "logsnr", "logsnr_end": 95})
    assert (build_sigmas(8, shift, length=10)[:-1] > 0).all()
    with pytest.raises(InvalidRequestError, match="no schedule of 1000 steps") as caught:
        build_sigmas(1000, shift, length=10)
    assert caught.value.field == "steps"
