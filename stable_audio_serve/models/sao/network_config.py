"""Parses the dimensions of transformer and autoencoder in a checkpoint's `model_config.json` to frozen dataclasses.

A missing key has the default of the reference implementation. A value that requires a different network raises an
error that names the key.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from stable_audio_serve.models import native_denoiser
from stable_audio_serve.models.config_reader import MAX_SIZE, ConfigReader
from stable_audio_serve.models.native_denoiser import parse_transformer

NUM_PREFIX = 1  # tokens before each row's frames: one, the global conditioning vector
HEAD_NORMS = ("none", "ln")
DILATIONS = (1, 3, 9)  # dilations of the three residual units at each resolution of the autoencoder
# How many inputs a convolution reads on each side of its position: (kernel size - 1) / 2, times the dilation.
_UNIT_REACH = 3 * sum(DILATIONS)  # the three residual units of one resolution together (kernel size 7)
_ENDS_REACH = 3  # the encoder's first convolution, and the decoder's first and last one (kernel size 7)
_CODE_REACH = 1  # the encoder's last convolution (kernel size 3)


@dataclass(frozen=True, slots=True)
class DenoiserConfig(native_denoiser.DenoiserConfig):
    """The dimensions of the diffusion transformer.

    If `projects_context`, the context is first projected to the network's width. Without that, `key_width` can be less
    than `width`. Then there are fewer heads of keys and values than query heads, and several query heads share a head
    of keys and values.
    """

    projects_context: bool

    @property
    def key_width(self) -> int:
        return self.width if self.projects_context else self.context_width


def parse_denoiser(diffusion: ConfigReader) -> DenoiserConfig:
    """Parse `model.diffusion.config`. Raises CheckpointError naming the key that cannot be used."""
    config = diffusion.section("config")
    config.require(
        global_cond_type="prepend", timestep_features_type="learned", num_memory_tokens=0, norm_type="layer_norm"
    )
    attention = config.section("attn_kwargs", optional=True)
    attention.require(differential=False)
    config.section("norm_kwargs", optional=True).require(eps=1e-5)
    parsed = DenoiserConfig(
        **parse_transformer(config),
        num_prefix=NUM_PREFIX,
        projects_context=config.flag("project_cond_tokens", default=True),
        head_norm=attention.choice("qk_norm", HEAD_NORMS, default="none"),
    )
    if parsed.key_width % parsed.head_width or parsed.num_heads % parsed.num_key_heads:
        expected = f"a number of whole heads of {parsed.head_width} channels that divides {parsed.num_heads} heads"
        raise config.unusable("cond_token_dim", expected)
    return parsed


@dataclass(frozen=True, slots=True)
class OobleckConfig:
    """The dimensions of the autoencoder.

    `widths` has the number of channels at each resolution, from audio to latents: one more number than `strides`.
    Encoding divides the latents by `scale`.
    """

    channels: int
    latent_channels: int
    widths: tuple[int, ...]
    strides: tuple[int, ...]
    final_tanh: bool
    scale: float

    @property
    def hop(self) -> int:
        """The number of audio samples per latent frame."""
        return math.prod(self.strides)

    @property
    def decoder_halo_latents(self) -> int:
        """How many latent frames on each side of a latent frame can influence the frame's audio.

        The samples [low, high] are traced back to the latent frames that they depend on, one convolution after another.
        """
        low, high = -_ENDS_REACH, self.hop - 1 + _ENDS_REACH
        for stride in self.strides:
            low, high = low - _UNIT_REACH, high + _UNIT_REACH
            padding = math.ceil(stride / 2)
            low, high = -(-(low + padding - (2 * stride - 1)) // stride), (high + padding) // stride
        low, high = low - _ENDS_REACH, high + _ENDS_REACH
        return max(-low, high)

    @property
    def encoder_halo_latents(self) -> int:
        """How many frames of `hop` samples on each side of a latent frame can influence the frame's latent."""
        low, high = -_CODE_REACH, _CODE_REACH
        for stride in reversed(self.strides):
            padding = math.ceil(stride / 2)
            low, high = low * stride - padding, high * stride - padding + 2 * stride - 1
            low, high = low - _UNIT_REACH, high + _UNIT_REACH
        low, high = low - _ENDS_REACH, high + _ENDS_REACH
        return max(math.ceil(-low / self.hop), math.ceil((high - self.hop + 1) / self.hop))


def parse_oobleck(model: ConfigReader) -> OobleckConfig:
    """Parse `model.pretransform`. Raises CheckpointError naming the key that cannot be used.

    The decoder must mirror the encoder, and the bottleneck must be variational. The downsampling ratio and the channel
    counts that the section states must match encoder and decoder.
    """
    pretransform = model.section("pretransform")
    pretransform.choice("type", ("autoencoder",))
    pretransform.require(model_half=False)
    config = pretransform.section("config")
    bottleneck, *coders = (config.section(name) for name in ("bottleneck", "encoder", "decoder"))
    bottleneck.require(config={})
    bottleneck.choice("type", ("vae",))
    for coder in coders:
        coder.require(soft_clip=False)
        coder.choice("type", ("oobleck",))
    encoder, decoder = (coder.section("config") for coder in coders)
    for part in (encoder, decoder):
        part.require(antialias_activation=False)
        if not part.flag("use_snake", default=False):
            raise part.unusable("use_snake", "true")
    decoder.require(use_nearest_upsample=False)
    parsed = OobleckConfig(
        channels=config.integer("io_channels", default=2),
        latent_channels=config.integer("latent_dim"),
        widths=_widths(encoder),
        strides=encoder.integers("strides"),
        final_tanh=decoder.flag("final_tanh", default=True),
        scale=pretransform.number("scale", default=1.0, at_least=1e-6),
    )
    _check_parts(parsed, config=config, encoder=encoder, decoder=decoder)
    return parsed


def _widths(part: ConfigReader) -> tuple[int, ...]:
    width, multiples = part.integer("channels", default=128), part.integers("c_mults")
    widths = tuple(width * multiple for multiple in (1, *multiples))
    if max(widths) > MAX_SIZE:
        raise part.unusable("c_mults", f"small enough that none of the widths is above {MAX_SIZE}")
    return widths


def _check_parts(parsed: OobleckConfig, *, config: ConfigReader, encoder: ConfigReader, decoder: ConfigReader) -> None:
    if len(parsed.strides) + 1 != len(parsed.widths):
        raise encoder.unusable("strides", "as many numbers as c_mults")
    if any(stride % 2 for stride in parsed.strides):
        raise encoder.unusable("strides", "even numbers")
    for part, key, default, wanted in (
        (encoder, "in_channels", 2, parsed.channels),
        (encoder, "latent_dim", None, 2 * parsed.latent_channels),
        (decoder, "out_channels", 2, parsed.channels),
        (decoder, "latent_dim", None, parsed.latent_channels),
        (config, "in_channels", parsed.channels, parsed.channels),
        (config, "out_channels", parsed.channels, parsed.channels),
        (config, "downsampling_ratio", None, parsed.hop),
    ):
        if part.integer(key, default=default) != wanted:
            raise part.unusable(key, f"{wanted}, as the other parts say")
    if decoder.integers("strides") != parsed.strides:
        raise decoder.unusable("strides", f"{list(parsed.strides)}, as the encoder's")
    if _widths(decoder) != parsed.widths:
        key = "c_mults" if _widths(decoder)[0] == parsed.widths[0] else "channels"
        raise decoder.unusable(key, "the encoder's")
