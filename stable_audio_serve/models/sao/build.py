"""Builds a model of the Stable Audio Open family from a checkpoint folder and a T5 folder."""

from __future__ import annotations

from pathlib import Path

import torch

from stable_audio_serve.core.catalog import DecodePrecision, ModelCard
from stable_audio_serve.core.errors import CheckpointError
from stable_audio_serve.models.checkpoint_files import find_weights
from stable_audio_serve.models.conditioners import NumberConditioner, PromptConditioner
from stable_audio_serve.models.config_reader import CONFIG_FILE, read_config
from stable_audio_serve.models.native import checkpoint_modules
from stable_audio_serve.models.protocol import ModelSpec
from stable_audio_serve.models.sao.conditioners import LearnedFrequencies, load_text_encoder
from stable_audio_serve.models.sao.config import OBJECTIVE_SAMPLERS, SaoConfig, parse_config
from stable_audio_serve.models.sao.denoiser import Denoiser
from stable_audio_serve.models.sao.model import SaoComponents, SaoModel
from stable_audio_serve.models.sao.oobleck import OobleckAutoencoder
from stable_audio_serve.models.sao.planning import read_shift
from stable_audio_serve.models.text_encoder import TextEncoder, stating_width
from stable_audio_serve.models.weight_files import release_pages
from stable_audio_serve.models.weight_sizes import DENOISER_KEYS
from stable_audio_serve.models.weights import SkipRandomWeights, load_weights, require_exact_float32

_TEXT_DTYPE = torch.float16  # dtype of the text encoder on every device, as in the reference implementation


def load_sao(
    card: ModelCard,
    folder: Path,
    *,
    text_encoder: Path,
    device: torch.device,
    dtype: torch.dtype,
    decode_precision: DecodePrecision,
) -> SaoModel:
    """Load the checkpoint and the text encoder.

    The denoiser has the dtype `dtype`, the text encoder float16, and the other networks float32. If `decode_precision`
    is "half" on a CPU, the decoder's convolutions are stored in half precision.

    The keys of the weight files must match the networks. Raises CheckpointError, which names the file or key, if not.
    """
    require_exact_float32()
    config = parse_config(read_config(folder))
    read_shift(config.shift)
    weights_file = find_weights(folder)
    text = load_text_encoder(text_encoder, max_length=config.prompt.max_length, device=device, dtype=_TEXT_DTYPE)
    try:
        with torch.device("meta"), SkipRandomWeights():  # `load_weights` below allocates and fills the weights
            components = build_components(config, text)
    except (RuntimeError, MemoryError) as error:
        raise CheckpointError(f"{folder / CONFIG_FILE} describes a network that cannot be built: {error}") from error
    modules = checkpoint_modules(components, config)
    with stating_width(text, text_encoder):
        mapped = load_weights(modules, weights_file, device=device, dtypes={DENOISER_KEYS: dtype})
    spec = build_spec(card, config)
    model = SaoModel(components, config=config, spec=spec, device=device, decode_precision=decode_precision)
    release_pages(mapped)  # the model replaced the autoencoder's mapped weights by computed kernels
    return model


def build_components(config: SaoConfig, text: TextEncoder) -> SaoComponents:
    """Build the networks of a config with torch's initial weights."""
    return SaoComponents(
        text=text,
        prompt=PromptConditioner(config.prompt, encoder_width=text.width, learns_padding=False),
        numbers={number.id: NumberConditioner(number, LearnedFrequencies()) for number in config.numbers},
        denoiser=Denoiser(config.denoiser),
        autoencoder=OobleckAutoencoder(config.autoencoder),
    )


def build_spec(card: ModelCard, config: SaoConfig) -> ModelSpec:
    """Returns the model's spec. The registry must have completed `card` from this config."""
    return ModelSpec(
        card=card,
        hop=config.autoencoder.hop,
        max_frames=config.window_frames,
        tail_samples=config.sample_size - config.window_frames * config.autoencoder.hop,
        default_sampler=OBJECTIVE_SAMPLERS[config.objective],
        noisy_source_encoder=True,
        packs_rows=True,
        captures_decode=True,
    )
