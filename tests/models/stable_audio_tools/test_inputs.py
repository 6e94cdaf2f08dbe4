"""Which conditioners a request can fill."""

from __future__ import annotations

from typing import Any

import pytest

from stable_audio_serve.core.errors import CheckpointError
from stable_audio_serve.models.config_reader import ConfigReader
from stable_audio_serve.models.stable_audio_tools.inputs import Inputs, NumberInput, parse_inputs


def parse(*configs: dict[str, Any], **others: Any) -> Inputs:
    conditioning = {"configs": [{"id": "prompt", "type": "t5", "config": {}}, *configs], "cond_dim": 8}
    diffusion = {key: others.pop(key) for key in list(others) if key.endswith("_ids")}
    model = {"conditioning": conditioning | others, "diffusion": diffusion}
    return parse_inputs(ConfigReader(model, path="model"))


def test_numbers_come_from_the_request_by_id_or_by_default_key() -> None:
    bars = {"id": "length", "type": "int", "config": {}}
    total = {"id": "seconds_total", "type": "number", "config": {}}
    inputs = parse(bars, total, default_keys={"length": "seconds_total"}, global_cond_ids=["length"])
    assert inputs == Inputs(
        "prompt", (NumberInput("length", "seconds_total", True), NumberInput(*["seconds_total"] * 2, False))
    )
    assert [number.value({"seconds_total": 7.9}) for number in inputs.numbers] == [7, 7.9]


@pytest.mark.parametrize(
    ("configs", "others", "said"),
    [
        ([{"id": "bpm", "type": "number"}], {}, r"model\.conditioning\.configs\[1\]\.id must be one of seconds_start"),
        ([{"id": "audio", "type": "pretransform"}], {}, r"configs\[1\]\.type must be one of t5, number, int"),
        ([{"id": "other", "type": "t5"}], {}, r"configs must be a list with exactly one conditioner of type t5"),
        ([], {"input_concat_ids": ["mask"]}, r"model\.diffusion\.input_concat_ids must be a list drawn from prompt"),
    ],
    ids=["a number nobody sends", "audio", "two prompts", "an id without conditioner"],
)
def test_what_no_request_can_fill_is_refused_by_name(
    configs: list[dict[str, Any]], others: dict[str, Any], said: str
) -> None:
    with pytest.raises(CheckpointError, match=said):
        parse(*configs, **others)
