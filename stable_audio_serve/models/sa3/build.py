"""Builds a model of the Stable Audio 3 family from a checkpoint folder."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from torch import nn

from stable_audio_serve.core.catalog import DecodePrecision, ModelCard
from stable_audio_serve.core.errors import CheckpointError
from stable_audio_serve.models.blocks.fourier import ExpoFourier
from stable_audio_serve.models.checkpoint_files import find_weights
from stable_audio_serve.models.conditioners import NumberConditioner, PromptConditioner
from stable_audio_serve.models.config_reader import CONFIG_FILE, ConfigReader, read_config
from stable_audio_serve.models.native import AUTOENCODER_KEYS, checkpoint_modules
from stable_audio_serve.models.precision import Products, decoder_products, stored_dtypes, stores_half
from stable_audio_serve.models.protocol import ModelSpec
from stable_audio_serve.models.sa3.autoencoder import AudioAutoencoder
from stable_audio_serve.models.sa3.config import INERT_KEYS, Sa3Config, parse_config
from stable_audio_serve.models.sa3.denoiser import Denoiser
from stable_audio_serve.models.sa3.model import Sa3Components, Sa3Model
from stable_audio_serve.models.sa3.t5gemma import T5GemmaEncoder
from stable_audio_serve.models.text_encoder import TextEncoder, load_encoder, stating_width
from stable_audio_serve.models.weight_files import release_pages
from stable_audio_serve.models.weight_sizes import DENOISER_KEYS
from stable_audio_serve.models.weights import SkipRandomWeights, load_weights, require_exact_float32


def load_sa3(
    card: ModelCard,
    folder: Path,
    *,
    text_encoder: Path,
    device: torch.device,
    dtype: torch.dtype,
    decode_precision: DecodePrecision,
) -> Sa3Model:
    """Load the checkpoint and the text encoder.

    The denoiser has the dtype `dtype`, the text encoder (a T5Gemma) the dtype of its files, or bfloat16 for float8, and
    the other networks float32. If `decode_precision` is "half" on a CPU, the decoder's linear layers are stored in half
    precision.

    The keys of the weight files must match the networks. Raises CheckpointError, which names the file or key, if not.
    """
    require_exact_float32()
    reader = read_config(folder)
    config = parse_config(reader)
    weights_file = find_weights(folder)
    text = load_text_encoder(text_encoder, max_length=config.prompt.max_length, device=device)
    try:
        with torch.device("meta"), SkipRandomWeights():  # `load_weights` below allocates and fills the weights
            components = build_components(config, text)
    except (RuntimeError, MemoryError) as error:
        raise CheckpointError(f"{folder / CONFIG_FILE} describes a network that cannot be built: {error}") from error
    reader.refuse_unread(inert=INERT_KEYS)
    modules = checkpoint_modules(components, config)
    dtypes = {DENOISER_KEYS: dtype}
    if stores_half(decode_precision, device):
        halves = stored_dtypes(cast("nn.Module", components.autoencoder.decoder), device)
        dtypes |= {f"{AUTOENCODER_KEYS}decoder.{name}.": half for name, half in halves.items()}
    with stating_width(text, text_encoder):
        mapped = load_weights(modules, weights_file, device=device, dtypes=dtypes)
    products = decoder_products(decode_precision, device)
    _check_autoencoder(components.autoencoder, products, device=device, source=folder / CONFIG_FILE)
    release_pages(mapped)  # the check loaded the encoder's weights, which only edits of audio need
    spec = build_spec(card, config, components=components)
    return Sa3Model(components, config=config, spec=spec, device=device, decode_precision=decode_precision)


def load_text_encoder(folder: Path, *, max_length: int, device: torch.device) -> TextEncoder:
    """Load the encoder of a T5Gemma. Raises CheckpointError if a file or key is missing, or if prompts are too long."""

    def build(config: ConfigReader) -> T5GemmaEncoder:
        encoder = config.section("encoder")
        # Longer prompts would need another mask in sliding-window layers.
        if encoder.integer("sliding_window", default=4096) < 2 * max_length:
            raise encoder.unusable("sliding_window", f"at least {2 * max_length} for prompts of {max_length} tokens")
        return T5GemmaEncoder(encoder)

    return load_encoder(folder, build, max_length=max_length, device=device)


def build_components(config: Sa3Config, text: TextEncoder) -> Sa3Components:
    """Build the networks of a config with torch's initial weights."""
    return Sa3Components(
        text=text,
        prompt=PromptConditioner(config.prompt, encoder_width=text.width, learns_padding=True),
        numbers={number.id: NumberConditioner(number, ExpoFourier(number.features)) for number in config.numbers},
        denoiser=Denoiser(config.denoiser),
        autoencoder=AudioAutoencoder(config.autoencoder),
    )


@torch.inference_mode()
def _check_autoencoder(net: AudioAutoencoder, products: Products, *, device: torch.device, source: Path) -> None:
    """Encode and decode one latent to check that the autoencoder's parts fit each other.

    Raises CheckpointError naming `source` if they do not. Their configs alone do not show whether they fit.
    """
    audio = torch.zeros(1, net.channels, net.hop, device=device)
    try:
        latents = net.encode(audio)[..., :1]
        made = net.decode(latents, products=products)[..., : net.hop]
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        message = f"{source}: model.pretransform.config describes parts that do not fit each other: {reason}"
        raise CheckpointError(message) from error
    if latents.shape[1] != net.latent_channels or made.shape != audio.shape:
        raise CheckpointError(f"{source}: model.pretransform.config does not lead from audio to latents and back")


def build_spec(card: ModelCard, config: Sa3Config, *, components: Sa3Components) -> ModelSpec:
    """Returns the model's spec. The registry must have completed `card` from this config."""
    lengths = config.lengths
    return ModelSpec(
        card=card,
        hop=lengths.hop,
        max_frames=lengths.max_frames,
        default_sampler=config.default_sampler,
        noisy_source_encoder=components.autoencoder.encoder.noisy,
        packs_rows=True,
        captures_decode=not components.autoencoder.pretransform.is_placed,
    )
