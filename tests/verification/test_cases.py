from __future__ import annotations

from typing import Any

import pytest
import torch

from stable_audio_serve.core.errors import CheckpointError
from stable_audio_serve.verification.checks import Goldens
from stable_audio_serve.verification.runs import parse_case, skip_reason

CLIP = torch.randn(2, 50)


def parse(args: dict[str, Any], *, chunked: bool = True, **facts: Any):
    defaults = {"steps": 5, "sample_size": 4096, "duration": 120, "duration_padding_sec": 6.0, "cfg_scale": 1.0}
    goldens = Goldens({"generate_defaults": defaults}, {"gen/a/clip": CLIP})
    return parse_case({"args": {"prompt": "rain", "seed": 3, **args}, **facts}, goldens=goldens, chunked=chunked)


def test_defaults_come_from_the_goldens() -> None:
    case = parse({})
    (request,) = case.requests
    assert (request.steps, case.sample_size, case.seed) == (5, 4096, 3)
    assert (request.duration_s, request.duration_padding_s, request.cfg_scale) == (120.0, 6.0, 1.0)
    assert request.sampler is None
    assert request.seed == 0


def test_a_list_has_one_value_per_row() -> None:
    prompts = ["rain", "wind"]
    case = parse({"batch_size": 2, "prompt": prompts, "negative_prompt": ["a", "b"], "duration": [2.5, 1]})
    assert [request.prompt for request in case.requests] == prompts
    assert [request.negative_prompt for request in case.requests] == ["a", "b"]
    assert [request.duration_s for request in case.requests] == [2.5, 1.0]
    assert [request.seed for request in case.requests] == [0, 1]
    with pytest.raises(CheckpointError, match="batch of 2"):
        parse({"batch_size": 2, "prompt": ["rain"]})


def test_every_argument_maps_to_a_field() -> None:
    (request,) = parse(
        {
            "sampler_type": "dpmpp",
            "scale_phi": 0.4,
            "cfg_norm_threshold": 2,
            "cfg_interval": [0.3, 0.9],
            "chunked_decode": False,
            "init_audio": {"sample_rate": 1250, "tensor": "gen/a/clip"},
            "inpaint_audio": {"sample_rate": 1000, "tensor": "gen/a/clip"},
            "inpaint_mask_start_seconds": [0.1, 0.5],
            "inpaint_mask_end_seconds": [0.2, 0.6],
        }
    ).requests
    assert (request.sampler, request.cfg_rescale, request.cfg_norm_threshold) == ("dpmpp", 0.4, 2.0)
    assert (request.cfg_interval, request.chunked_decode) == ((0.3, 0.9), False)
    assert request.init_audio is not None
    assert request.init_audio.sample_rate_hz == 1250
    assert request.inpaint_regions_s == ((0.1, 0.2), (0.5, 0.6))


@pytest.mark.parametrize("chunked", [True, False])
def test_a_case_overrides_the_chunked_decoding_of_the_config(chunked: bool) -> None:
    assert parse({}, chunked=chunked).requests[0].chunked_decode is chunked
    for stated in (True, False):
        assert parse({"chunked_decode": stated}, chunked=chunked).requests[0].chunked_decode is stated


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        ({"seed": 1, "lora_strength": 0.5}, "lora_strength"),
        ({"seed": -1}, "random"),
        ({}, "random"),
        ({"seed": 1, "lora_strength": None}, None),
    ],
)
def test_the_skip_reason_is_reported(args: dict[str, Any], reason: str | None) -> None:
    found = skip_reason(args)
    assert (found is None) == (reason is None)
    assert reason is None or reason in str(found)
