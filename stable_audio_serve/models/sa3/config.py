"""Parses a checkpoint's `model_config.json`, which defines every dimension of the networks, to frozen dataclasses.

A missing key has the default of the reference implementation. Parsing raises an error that names the key if a value
requires a different network. `ConfigReader.refuse_unread` then finds keys that are neither read nor in `INERT_KEYS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stable_audio_serve.models import native_denoiser
from stable_audio_serve.models.blocks.norms import HEAD_NORMS
from stable_audio_serve.models.conditioners import (
    ConditionersConfig,
    NumberConfig,
    PromptConfig,
    parse_number,
    parse_prompt,
)
from stable_audio_serve.models.config_reader import MAX_SAMPLES, ConfigReader
from stable_audio_serve.models.native_denoiser import parse_transformer
from stable_audio_serve.models.oscillator.timeline import NUM_TIMELINE_FEATURES, TempoRule, parse_timeline
from stable_audio_serve.models.sa3.lengths import LengthRule

# Config keys that have no effect on inference, at any depth of the file.
INERT_KEYS = frozenset(
    {
        # They affect only training.
        *("training", "dataset", "svd_bases_path", "distribution_shift_options", "pre_encoded_keys", "checkpointing"),
        *("requires_grad", "enable_grad", "freeze", "freeze_backbone", "zero_init_branch_outputs", "zero_init_output"),
        *("dropout", "attn_dropout", "ff_dropout", "enable_inner_layer_dropout", "cfg_dropout_prob", "dropout_prob"),
        # The keys on the first line below do not change the reference implementation's result: `scale` is 1. It ignores
        # the keys on the second line, at least with the values that `parse_denoiser` requires.
        *("iterate_batch", "use_flash", "force_fp32", "scale", "abs_pos_emb_max_length"),
        *("use_snake", "mapping_style", "conv_bias", "use_dilated_conv", "causal", "conv_kernel_size", "fix_scale"),
        # The reference implementation behaves as if both keys were true, whatever their values are.
        *("mask_padding_attention", "use_effective_length_for_schedule"),
        # These keys locate the text encoder. `checkpoint_files` reads them.
        *("model_path", "model_name", "subfolder", "repo_id"),
    }
)

MODEL_TYPES = ("diffusion_cond_inpaint", "diffusion_cond")
# Lengths are rounded to this value if the encoder's config has no `chunk_size`, as in the reference implementation. The
# encoder itself then uses chunks of 128.
DEFAULT_CHUNK_FRAMES = 32

# The default sampler of each training objective.
OBJECTIVE_SAMPLERS = {"rf_denoiser": "pingpong", "rectified_flow": "euler"}

EDIT_IDS = ("inpaint_mask", "inpaint_masked_input")


@dataclass(frozen=True, slots=True)
class DenoiserConfig(native_denoiser.DenoiserConfig):
    """The dimensions of the diffusion transformer. `local_width` 0 means no local (per-frame) conditioning.

    `num_prefix` is the number of memory tokens.
    """

    local_width: int
    differential: bool
    norm_eps: float
    time_logsnr: bool


def parse_denoiser(config: ConfigReader) -> DenoiserConfig:
    """Parse `model.diffusion.config`. Raises CheckpointError naming the key that cannot be used."""
    config.require(project_cond_tokens=True, cross_attn_rotary_pos_emb=False)
    config.choice("global_cond_type", ("adaLN",), default="prepend")
    config.choice("timestep_features_type", ("expo",), default="learned")
    config.choice("norm_type", ("rms_norm",), default="layer_norm")
    attention = config.section("attn_kwargs", optional=True)
    attention.require(qk_norm_eps=1e-6)
    config.section("ff_kwargs", optional=True).require(sinusoidal=False)
    return DenoiserConfig(
        **parse_transformer(config),
        local_width=config.integer("local_add_cond_dim", default=0, at_least=0),
        num_prefix=config.integer("num_memory_tokens", default=0, at_least=0),
        differential=attention.flag("differential", default=False),
        head_norm=attention.choice("qk_norm", HEAD_NORMS, default="none"),
        norm_eps=config.section("norm_kwargs", optional=True).number("eps", default=1e-5, at_least=0),
        time_logsnr=config.flag("timestep_features_logsnr", default=False),
    )


@dataclass(frozen=True, slots=True)
class Sa3Config(ConditionersConfig):
    """All values that Stable Audio 3 models read from a checkpoint's config.

    `local_ids` has ids of per-frame inputs, from EDIT_IDS or `timelines`. `timelines` says by id how each conditioner
    of the type `timeline` reads the tempo. `chunked` is true if the reference implementation encodes and decodes in
    windows. `shift` is the config section about the timestep shift; None: the default shift.
    """

    default_sampler: str
    channels: int
    latent_channels: int
    lengths: LengthRule
    denoiser: DenoiserConfig
    autoencoder: ConfigReader
    chunked: bool
    timelines: Mapping[str, TempoRule]
    local_ids: tuple[str, ...]
    shift: Mapping[str, Any] | None

    @property
    def edits(self) -> bool:
        """Whether the denoiser has an input for the latents that an edit keeps, or for the mask of these latents."""
        return any(id_ in self.local_ids for id_ in EDIT_IDS)


def parse_config(config: ConfigReader) -> Sa3Config:
    """Parse a `model_config.json`. Raises CheckpointError naming the key that cannot be used."""
    config.choice("model_type", MODEL_TYPES)
    model = config.section("model")
    diffusion = model.section("diffusion")
    diffusion.choice("type", ("dit",))
    diffusion.require(input_concat_ids=[], prepend_cond_ids=[], modular_local_cond_configs=[])
    objective = diffusion.choice("diffusion_objective", tuple(OBJECTIVE_SAMPLERS))
    pretransform = model.section("pretransform")
    pretransform.choice("type", ("autoencoder",))
    autoencoder = pretransform.section("config")
    prompt, numbers, timelines = _parse_conditioners(model.section("conditioning"))
    parsed = Sa3Config(
        default_sampler=OBJECTIVE_SAMPLERS[objective],
        channels=config.integer("audio_channels", default=2),
        latent_channels=model.integer("io_channels"),
        lengths=_parse_lengths(config, autoencoder),
        denoiser=parse_denoiser(diffusion.section("config")),
        autoencoder=autoencoder,
        chunked=pretransform.flag("chunked", default=False),
        prompt=prompt,
        numbers=numbers,
        timelines=timelines,
        context_ids=diffusion.texts("cross_attention_cond_ids"),
        global_ids=diffusion.texts("global_cond_ids"),
        local_ids=diffusion.texts("local_add_cond_ids"),
        shift=diffusion.plain("sampling_distribution_shift_options"),
    )
    _check_widths(parsed, diffusion)
    return parsed


def _parse_lengths(config: ConfigReader, autoencoder: ConfigReader) -> LengthRule:
    encoder = autoencoder.section("encoder").section("config", optional=True)
    chunk = encoder.integer("chunk_size", default=DEFAULT_CHUNK_FRAMES)
    strides = encoder.integers("strides") if "strides" in encoder else ()
    stride = strides[0] if strides else chunk
    rule = LengthRule(
        sample_rate_hz=config.integer("sample_rate", at_most=MAX_SAMPLES),
        hop=autoencoder.integer("downsampling_ratio"),
        frame_multiple=max(chunk // stride, 1),
        max_samples=config.integer("sample_size", at_most=MAX_SAMPLES),
    )
    if rule.max_samples < rule.hop:
        raise config.unusable("sample_size", f"at least one latent frame ({rule.hop})")
    return rule


def _parse_conditioners(
    conditioning: ConfigReader,
) -> tuple[PromptConfig, tuple[NumberConfig, ...], dict[str, TempoRule]]:
    width = conditioning.integer("cond_dim")
    prompts, numbers = [], []
    timelines: dict[str, TempoRule] = {}
    for item in conditioning.sections("configs"):
        match item.choice("type", ("t5gemma", "number", "timeline")):
            case "t5gemma":
                prompts.append(_parse_prompt(item, width))
            case "number":
                numbers.append(_parse_number(item, width))
            case _:
                timelines[item.text("id")] = parse_timeline(item.section("config"))
    # `default_keys` has a substitute for each number that a request may omit. A request to this server always has all
    # numbers, so an entry for one of them would have no effect. Such an entry is refused.
    for id_ in conditioning.plain("default_keys") or {}:
        if id_ in (number.id for number in numbers):
            raise conditioning.unusable("default_keys", f"without {id_!r}, which requests always say")
    if len(prompts) != 1:
        raise conditioning.unusable("configs", "a list with exactly one conditioner of type t5gemma")
    return prompts[0], tuple(numbers), timelines


def _parse_prompt(item: ConfigReader, width: int) -> PromptConfig:
    item.section("config", optional=True).choice("padding_mode", ("learned",), default="zero")
    return parse_prompt(item, width=width)


def _parse_number(item: ConfigReader, width: int) -> NumberConfig:
    config = item.section("config", optional=True)
    config.choice("fourier_features_type", ("expo",), default="learned")
    return parse_number(item, width=width, features=config.even("fourier_features_dim", default=256))


def _check_widths(config: Sa3Config, diffusion: ConfigReader) -> None:
    """Raise CheckpointError if ids or widths of conditioners do not fit. Otherwise torch would raise an error later."""
    network = diffusion.section("config")
    number_ids = tuple(number.id for number in config.numbers)
    for key, ids, known in (
        ("cross_attention_cond_ids", config.context_ids, (config.prompt.id, *number_ids)),
        ("global_cond_ids", config.global_ids, number_ids),
        ("local_add_cond_ids", config.local_ids, (*EDIT_IDS, *config.timelines)),
    ):
        if any(id_ not in known for id_ in ids):
            raise diffusion.unusable(key, "a list drawn from " + ", ".join(known))
    if not config.context_ids:
        raise diffusion.unusable("cross_attention_cond_ids", f"a list with at least {config.prompt.id!r}")
    if not config.global_ids:
        raise diffusion.unusable("global_cond_ids", "a list with at least one number conditioner")
    local_widths = {"inpaint_mask": 1, "inpaint_masked_input": config.latent_channels}
    local_widths |= dict.fromkeys(config.timelines, NUM_TIMELINE_FEATURES)
    for key, found, wanted in (
        ("io_channels", config.denoiser.latent_channels, config.latent_channels),
        ("cond_token_dim", config.denoiser.context_width, config.prompt.width),
        ("global_cond_dim", config.denoiser.global_width, config.prompt.width * len(config.global_ids)),
        ("local_add_cond_dim", config.denoiser.local_width, sum(local_widths[id_] for id_ in config.local_ids)),
    ):
        if found != wanted:
            raise network.unusable(key, f"{wanted}, as the conditioners and the autoencoder make")
    if config.autoencoder.integer("latent_dim") != config.latent_channels:
        raise config.autoencoder.unusable("latent_dim", f"model.io_channels ({config.latent_channels})")
    if config.autoencoder.integer("io_channels", default=2) != config.channels:
        raise config.autoencoder.unusable("io_channels", f"audio_channels ({config.channels})")
