"""Parses the conditioners in a `model_config.json` for the package stable-audio-tools.

The package raises errors for unknown keys in sections named `config`, but ignores unknown keys elsewhere. For those,
this module raises an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from stable_audio_serve.models.conditioners import NUMBER_IDS, PromptConfig, parse_prompt
from stable_audio_serve.models.config_reader import ConfigReader
from stable_audio_serve.models.sao.config import SHIFT_KEY

_USES = ("cross_attention_cond_ids", "global_cond_ids", "prepend_cond_ids", "input_concat_ids")
_PART = ("type", "config", "requires_grad")
_PROMPT = ("t5_model_name", "max_length", "project_out", "enable_grad")
_KEYS: Mapping[str, tuple[str, ...]] = {
    "": ("model_type", "sample_size", "sample_rate", "audio_channels", "model", "training", "dataset"),
    "model": ("pretransform", "conditioning", "diffusion", "io_channels"),
    "model.diffusion": ("type", "config", "diffusion_objective", SHIFT_KEY, *_USES),
    "model.conditioning": ("configs", "cond_dim", "default_keys"),
    "model.pretransform": ("type", "config", "scale", "model_half", "iterate_batch", "chunked", "enable_grad"),
    "model.pretransform.config": (
        *("encoder", "decoder", "bottleneck", "latent_dim", "downsampling_ratio"),
        *("io_channels", "in_channels", "out_channels", "pretransform"),
    ),
    "model.pretransform.config.encoder": _PART,
    "model.pretransform.config.decoder": (*_PART, "soft_clip"),
    "model.pretransform.config.bottleneck": _PART,
}


@dataclass(frozen=True, slots=True)
class NumberInput:
    """A number conditioner. `source` (one of `NUMBER_IDS`) is the request's number that the conditioner embeds."""

    id: str
    source: str
    is_whole: bool

    def value(self, numbers: Mapping[str, float]) -> float:
        """Returns the number that this conditioner embeds, truncated if the conditioner needs an integer."""
        value = numbers[self.source]
        return int(value) if self.is_whole else value


@dataclass(frozen=True, slots=True)
class Inputs:
    """The conditioners of a config."""

    prompt: PromptConfig
    numbers: tuple[NumberInput, ...]


def parse_inputs(config: ConfigReader) -> Inputs:
    """Returns the conditioners of a config.

    Raises CheckpointError if requests have no value for a conditioner, or if the package would ignore a key.
    """
    _refuse_unknown(config)
    config.choice("model_type", ("diffusion_cond",))
    model = config.section("model")
    model.section("pretransform").choice("type", ("autoencoder",))
    diffusion = model.section("diffusion")
    diffusion.choice("type", ("dit",))
    network = diffusion.section("config")
    if "sliding_window" in network:
        raise network.unusable("sliding_window", "unset: the package needs flash_attn for it, which rounds to float16")
    network.choice("timestep_cond_type", ("global",), default="global")  # the package fails in each call of another one
    inputs = _parse_conditioners(model.section("conditioning"))
    known = (inputs.prompt.id, *(number.id for number in inputs.numbers))
    for key in _USES:
        if any(id_ not in known for id_ in diffusion.texts(key)):
            raise diffusion.unusable(key, "a list drawn from " + ", ".join(known))
    return inputs


def _parse_conditioners(conditioning: ConfigReader) -> Inputs:
    substitutes = conditioning.plain("default_keys") or {}
    prompts: list[PromptConfig] = []
    numbers: list[NumberInput] = []
    for item in conditioning.sections("configs"):
        item.refuse_unknown(("id", "type", "config"))
        id_, kind = item.text("id"), item.choice("type", ("t5", "number", "int"))
        if kind == "t5":
            item.section("config", optional=True).refuse_unknown(_PROMPT)
            prompts.append(parse_prompt(item, width=conditioning.integer("cond_dim")))
            continue
        source = id_ if id_ in NUMBER_IDS else substitutes.get(id_)
        if source not in NUMBER_IDS:
            raise item.unusable("id", "one of " + ", ".join(NUMBER_IDS))
        numbers.append(NumberInput(id_, source, is_whole=kind == "int"))
    if len(prompts) != 1:
        raise conditioning.unusable("configs", "a list with exactly one conditioner of type t5")
    return Inputs(prompts[0], tuple(numbers))


def _refuse_unknown(config: ConfigReader) -> None:
    for path, keys in _KEYS.items():
        section = config
        for name in path.split(".") if path else ():
            section = section.section(name, optional=name == "bottleneck")
        section.refuse_unknown(keys)
