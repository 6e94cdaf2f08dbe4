"""docs/models.md lists exactly the keys of `model_config.json` that the loader knows."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from stable_audio_serve.core.errors import CheckpointError
from stable_audio_serve.models.config_reader import ConfigReader
from stable_audio_serve.models.sa3.build import build_components
from stable_audio_serve.models.sa3.config import INERT_KEYS, parse_config
from stable_audio_serve.models.text_encoder import TextEncoder
from tests.goldens import load_goldens
from tests.models.loaded import loaded

PAGE = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
USED, INERT = PAGE.split("## Keys of `model_config.json`")[1].split("### Without effect")


def keys_of(row: str) -> list[str]:
    """Returns the keys in the first column of a table row."""
    return re.findall(r"`([^`]+)`", row.split("|")[1]) if row.startswith("| `") else []


@cache
def documented() -> frozenset[str]:
    """Returns the full paths of the documented keys, except keys without effect.

    The docs list only the encoder's keys. This function adds the decoder's keys, which have the same names.
    """
    found = set()
    for section in USED.split("\n### ")[1:]:
        place = re.match(r"`([^`]+)`", section)
        for row in section.splitlines():
            found |= {f"{place[1]}.{key}" if place else key for key in keys_of(row)}
    decoder = {path.replace(".encoder.config.", ".decoder.config.") for path in found}
    return frozenset(found | {path.replace(".decoder.config.in_", ".decoder.config.out_") for path in decoder})


def leaves(values: Any, place: str = "") -> Iterator[str]:
    """Yield the full path of every key whose value is not an object. Items of a list have their index in brackets."""
    for key, value in values.items():
        path = f"{place}.{key}" if place else key
        if isinstance(value, dict):
            yield from leaves(value, path)
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            yield path
            for i, item in enumerate(value):
                yield from leaves(item, f"{path}[{i}]")
        else:
            yield path


def put(config: dict[str, Any], path: str, value: Any) -> None:
    *sections, last = [int(part) if part.isdigit() else part for part in re.split(r"\.|\[|\]\.", path)]
    place: Any = config
    for part in sections:
        place = place[part] if isinstance(place, list) else place.setdefault(part, {})
    place[last] = value


def build(config: dict[str, Any], text: TextEncoder) -> str:
    """Build a model from this config, without weights. Returns the error message, or an empty text."""
    reader = ConfigReader(config)
    try:
        with torch.device("meta"):
            build_components(parse_config(reader), text)
        reader.refuse_unread(inert=INERT_KEYS)
    except CheckpointError as error:
        return error.message
    return ""


def is_inert(path: str) -> bool:
    return bool(INERT_KEYS & set(re.split(r"\.|\[\d+\]\.", path)))


@pytest.mark.parametrize("name", ["tiny-s", "tiny-l", "sharp-s", "sharp-l"])
def test_every_key_of_a_checkpoint_is_on_the_page(name: str) -> None:
    config = json.loads((load_goldens(name).folder / "model_config.json").read_text())
    assert {path for path in leaves(config) if not is_inert(path)} <= documented()


def test_keys_without_effect_match_the_code() -> None:
    assert {key for row in INERT.splitlines() for key in keys_of(row)} == INERT_KEYS


@pytest.mark.server
def test_exactly_the_documented_keys_are_validated() -> None:
    """The loader notices a wrong value of every documented key, and refuses every other key."""
    config = json.loads((load_goldens("sharp-s").folder / "model_config.json").read_text())
    text = loaded("sharp-s").text
    assert build(copy.deepcopy(config), text) == ""
    for path in documented():
        changed = copy.deepcopy(config)
        put(changed, path, [["impossible"]])
        message = build(changed, text)
        assert message, path
        assert "is not known here" not in message, path
    put(config, "model.diffusion.config.invented", [["impossible"]])
    assert "model.diffusion.config.invented is not known here" in build(config, text)
