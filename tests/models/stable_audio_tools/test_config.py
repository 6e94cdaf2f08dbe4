"""Configs for stable-audio-tools: which ones are accepted, and which number of a request a conditioner gets."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.models import official_config
from stable_audio_serve.core.errors import CheckpointError
from stable_audio_serve.models.conditioners import PromptConfig
from stable_audio_serve.models.config_reader import ConfigReader
from stable_audio_serve.models.stable_audio_tools.config import Inputs, NumberInput, parse_inputs


def make_config(*conditioners: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Returns a published config with additional `conditioners` and with `changes` to its sections.

    The keyword of a change is the path of a section in `model`, joined by `__`. The value updates the section.
    """
    values = official_config("stable-audio-open-small")
    values["model"]["conditioning"]["configs"] += conditioners
    for path, change in changes.items():
        section = values["model"]
        for name in path.split("__"):
            section = section[name]
        section |= change
    return values


def test_numbers_come_from_the_request_by_id_or_default_key() -> None:
    bars = {"id": "length", "type": "int", "config": {}}
    config = make_config(bars, conditioning={"default_keys": {"length": "seconds_start"}})
    inputs = parse_inputs(ConfigReader(config))
    numbers = NumberInput("seconds_total", "seconds_total", False), NumberInput("length", "seconds_start", True)
    assert inputs == Inputs(PromptConfig("prompt", 768, 64, False), numbers)
    assert [number.value({"seconds_total": 7.9, "seconds_start": 3.9}) for number in inputs.numbers] == [7.9, 3]


@pytest.mark.parametrize(
    ("conditioners", "changes", "expected"),
    [
        ([{"id": "bpm", "type": "number"}], {}, r"model\.conditioning\.configs\[2\]\.id must be one of seconds_start"),
        ([{"id": "audio", "type": "pretransform"}], {}, r"configs\[2\]\.type must be one of t5, number, int"),
        ([{"id": "other", "type": "t5"}], {}, r"configs must be a list with exactly one conditioner of type t5"),
        ([], {"diffusion": {"input_concat_ids": ["mask"]}}, r"input_concat_ids must be a list drawn from prompt"),
        ([], {"diffusion": {"type": "adp_1d"}}, r"model\.diffusion\.type must be one of dit"),
        ([], {"diffusion__config": {"sliding_window": [8, 8]}}, r"diffusion\.config\.sliding_window must be unset"),
        ([], {"diffusion__config": {"timestep_cond_type": "input_concat"}}, r"cond_type must be one of global"),
        ([], {"diffusion": {"mask_padding": True}}, r"model\.diffusion\.mask_padding is not known"),
        ([], {"conditioning": {"pre_encoded_keys": ["prompt"]}}, r"conditioning\.pre_encoded_keys is not known"),
        ([], {"pretransform": {"type": "wavelet"}}, r"model\.pretransform\.type must be one of autoencoder"),
        ([], {"pretransform__config__decoder": {"hard_clip": True}}, r"config\.decoder\.hard_clip is not known"),
    ],
    ids=[
        "a number nobody sends", "audio", "two prompts", "an id without conditioner", "another network",
        "windowed attention", "time as channels", "diffusion", "conditioning", "another pretransform", "decoder",
    ],
)  # fmt: skip
def test_unfillable_conditioners_and_ignored_keys_are_refused(
    conditioners: list[dict[str, Any]], changes: dict[str, Any], expected: str
) -> None:
    with pytest.raises(CheckpointError, match=expected):
        parse_inputs(ConfigReader(make_config(*conditioners, **changes)))
