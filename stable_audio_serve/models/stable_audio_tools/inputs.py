"""Which conditioners of a config a request can fill, and with what. Knows the config, no network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from stable_audio_serve.models.config_reader import ConfigReader
from stable_audio_serve.models.sao.config import NUMBER_IDS

_USES = ("cross_attention_cond_ids", "global_cond_ids", "prepend_cond_ids", "input_concat_ids")


@dataclass(frozen=True, slots=True)
class NumberInput:
    """A conditioner of a number: its id, and which number of a request (`sao.config.NUMBER_IDS`) it is given."""

    id: str
    source: str
    is_whole: bool

    def value(self, numbers: Mapping[str, float]) -> float:
        """Returns the request's number, its fraction cut off where only whole ones are known."""
        value = numbers[self.source]
        return int(value) if self.is_whole else value


@dataclass(frozen=True, slots=True)
class Inputs:
    """The id of the conditioner of prompts, and those of numbers."""

    prompt: str
    numbers: tuple[NumberInput, ...]


def parse_inputs(model: ConfigReader) -> Inputs:
    """Returns a config's conditioners. Raises CheckpointError naming one that no request can fill."""
    conditioning = model.section("conditioning")
    others = conditioning.plain("default_keys") or {}
    prompts: list[str] = []
    numbers: list[NumberInput] = []
    for item in conditioning.sections("configs"):
        id_ = item.text("id")
        kind = item.choice("type", ("t5", "number", "int"))
        if kind == "t5":
            prompts.append(id_)
            continue
        source = id_ if id_ in NUMBER_IDS else others.get(id_)
        if source not in NUMBER_IDS:
            raise item.unusable("id", "one of " + ", ".join(NUMBER_IDS))
        numbers.append(NumberInput(id_, source, is_whole=kind == "int"))
    if len(prompts) != 1:
        raise conditioning.unusable("configs", "a list with exactly one conditioner of type t5")
    known = (prompts[0], *(number.id for number in numbers))
    diffusion = model.section("diffusion")
    for key in _USES:
        if any(id_ not in known for id_ in diffusion.texts(key, default=())):
            raise diffusion.unusable(key, "a list drawn from " + ", ".join(known))
    return Inputs(prompts[0], tuple(numbers))
