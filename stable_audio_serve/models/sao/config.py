"""Parses a `model_config.json` of the Stable Audio Open family to frozen dataclasses. The module `network_config`
parses the sections with the networks' dimensions.

A missing key has the default of the reference implementation. A key that is neither read nor in `INERT_KEYS`, or a
value that requires a different network, raises an error that names the key.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stable_audio_serve.models.conditioners import (
    ConditionersConfig,
    NumberConfig,
    PromptConfig,
    parse_number,
    parse_prompt,
)
from stable_audio_serve.models.config_reader import MAX_SAMPLES, ConfigReader
from stable_audio_serve.models.sao.network_config import (
    DenoiserConfig,
    OobleckConfig,
    parse_denoiser,
    parse_oobleck,
)

# The default sampler of each training objective.
OBJECTIVE_SAMPLERS = {"v": "dpmpp-3m-sde", "rectified_flow": "euler", "rf_denoiser": "pingpong"}

NUM_FREQUENCIES = 128  # of a number conditioner

# Config keys that have no effect on inference, at any depth of the file.
INERT_KEYS = frozenset(
    {
        # They affect only training, the initial weights, or which tensors of a checkpoint were trained.
        *("training", "dataset", "requires_grad", "enable_grad", "zero_init_branch_outputs", "zero_init_output"),
        *("bias", "fix_scale"),
        # They affect only batching, precision, a table that is not used, or convolutions, which `use_conv` turns on.
        # `chunked` selects windows that overlap by 32 latents. If each latent influences more than 16 on a side, the
        # reference implementation's windows have seams; the windows here never have.
        *("iterate_batch", "chunked", "force_fp32", "abs_pos_emb_max_length", "conv_kernel_size"),
    }
)

SHIFT_KEY = "distribution_shift_options"


@dataclass(frozen=True, slots=True)
class SaoConfig(ConditionersConfig):
    """All values that Stable Audio Open models read from a checkpoint's config.

    `shift` is the config section about the timestep shift of the sampler RK4; None: no shift.
    """

    objective: str
    sample_rate_hz: int
    sample_size: int
    denoiser: DenoiserConfig
    autoencoder: OobleckConfig
    shift: Mapping[str, Any] | None

    @property
    def window_frames(self) -> int:
        """The number of latent frames that the network always generates: the whole frames in `sample_size`."""
        return self.sample_size // self.autoencoder.hop


def parse_config(config: ConfigReader) -> SaoConfig:
    """Parse a `model_config.json`. Raises CheckpointError naming the key that cannot be used."""
    config.choice("model_type", ("diffusion_cond",))
    model = config.section("model")
    diffusion = model.section("diffusion")
    diffusion.choice("type", ("dit",))
    diffusion.require(prepend_cond_ids=[], input_concat_ids=[])
    autoencoder = parse_oobleck(model)
    prompt, numbers = _parse_conditioners(model)
    parsed = SaoConfig(
        objective=diffusion.choice("diffusion_objective", tuple(OBJECTIVE_SAMPLERS), default="v"),
        sample_rate_hz=config.integer("sample_rate", at_most=MAX_SAMPLES),
        sample_size=config.integer("sample_size", at_least=autoencoder.hop, at_most=MAX_SAMPLES),
        denoiser=parse_denoiser(diffusion),
        autoencoder=autoencoder,
        prompt=prompt,
        numbers=numbers,
        context_ids=diffusion.texts("cross_attention_cond_ids"),
        global_ids=diffusion.texts("global_cond_ids"),
        shift=diffusion.plain(SHIFT_KEY),
    )
    _check_parts(parsed, config=config, model=model, diffusion=diffusion)
    config.refuse_unread(inert=INERT_KEYS)
    return parsed


def _parse_conditioners(model: ConfigReader) -> tuple[PromptConfig, tuple[NumberConfig, ...]]:
    conditioning = model.section("conditioning")
    conditioning.require(default_keys={}, pre_encoded_keys=[])
    width = conditioning.integer("cond_dim")
    prompts, numbers = [], []
    for item in conditioning.sections("configs"):
        if item.choice("type", ("t5", "number")) == "t5":
            prompts.append(_parse_prompt(item, width))
        else:
            numbers.append(_parse_number(item, width))
    if len(prompts) != 1:
        raise conditioning.unusable("configs", "a list with exactly one conditioner of type t5")
    return prompts[0], tuple(numbers)


def _parse_prompt(item: ConfigReader, width: int) -> PromptConfig:
    config = item.section("config", optional=True)
    if not config.text("t5_model_name", default="t5-base").strip("/. "):
        raise config.unusable("t5_model_name", "the name of a T5")
    return parse_prompt(item, width=width)


def _parse_number(item: ConfigReader, width: int) -> NumberConfig:
    item.section("config", optional=True).require(fourier_features_type="learned")
    return parse_number(item, width=width, features=2 * NUM_FREQUENCIES + 1)


def _check_parts(parsed: SaoConfig, *, config: ConfigReader, model: ConfigReader, diffusion: ConfigReader) -> None:
    """Raise CheckpointError if the networks do not fit each other. Otherwise torch would raise an error later."""
    number_ids = tuple(number.id for number in parsed.numbers)
    for key, ids, known in (
        ("cross_attention_cond_ids", parsed.context_ids, (parsed.prompt.id, *number_ids)),
        ("global_cond_ids", parsed.global_ids, number_ids),
    ):
        if not ids or any(id_ not in known for id_ in ids):
            raise diffusion.unusable(key, "a list drawn from " + ", ".join(known))
    network, latents = diffusion.section("config"), parsed.autoencoder.latent_channels
    for reader, key, default, wanted in (
        (model, "io_channels", None, latents),
        (network, "io_channels", 32, latents),
        (network, "cond_token_dim", None, parsed.prompt.width),
        (network, "global_cond_dim", None, parsed.prompt.width * len(parsed.global_ids)),
        (config, "audio_channels", 2, parsed.autoencoder.channels),
    ):
        if reader.integer(key, default=default) != wanted:
            raise reader.unusable(key, f"{wanted}, as the conditioners and the autoencoder make")
