"""Writes trained networks, in half precision, to a checkpoint folder in the Stable Audio 3 format, and reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from examples.demo_model import architecture
from examples.demo_model.train_autoencoder import Autoencoder, AutoencoderConfig
from examples.demo_model.train_denoiser import Network, Trainer
from examples.demo_model.vocabulary import MAX_TOKENS, write_tokenizer

_TOKENIZER_CONFIG = {
    "backend": "tokenizers",
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "model_max_length": MAX_TOKENS,
    "pad_token": "<pad>",
    "padding_side": "right",
    "tokenizer_class": "TokenizersBackend",
    "truncation_side": "right",
    "unk_token": "<unk>",
}


def write_checkpoint(trainer: Trainer, autoencoder: Autoencoder, *, folder: Path) -> None:
    """Write the checkpoint with the averaged weights to `folder`. Other files in the folder are kept."""
    network = Network()
    network.load_state_dict(trainer.average)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model_config.json").write_text(json.dumps(architecture.model_config(), indent=1) + "\n")
    save_file(_half(_weights(network, autoencoder)), folder / "model.safetensors", metadata={"format": "pt"})
    text = folder / architecture.TEXT_FOLDER
    cast("Any", network.text.half()).save_pretrained(text)
    write_tokenizer(text)
    (text / "tokenizer_config.json").write_text(json.dumps(_TOKENIZER_CONFIG, indent=1) + "\n")


def read_checkpoint(folder: Path) -> tuple[Network, Autoencoder]:
    """Returns the networks of a checkpoint that `write_checkpoint` wrote, in float32."""
    from transformers import T5GemmaEncoderModel  # loads in 2 s; few programs read a checkpoint

    network, autoencoder = Network(), Autoencoder(AutoencoderConfig())
    stored = load_file(folder / "model.safetensors")
    for key, value in _weights(network, autoencoder).items():
        value.detach().copy_(stored[key])
    text = T5GemmaEncoderModel.from_pretrained(
        folder / architecture.TEXT_FOLDER, dtype=torch.float32, is_encoder_decoder=False, attn_implementation="eager"
    )
    network.text.load_state_dict(text.state_dict())
    return network, autoencoder


def _weights(network: Network, autoencoder: Autoencoder) -> dict[str, Tensor]:
    """Returns the tensors of `model.safetensors` by key. The text encoder has its own files."""
    linear = cast("nn.Linear", network.seconds[1])
    prefix = "conditioner.conditioners"
    weights: dict[str, Tensor] = {
        f"{prefix}.prompt.padding_embedding": network.padding_embedding,
        f"{prefix}.seconds_total.embedder.embedding.1.weight": linear.weight,
        f"{prefix}.seconds_total.embedder.embedding.1.bias": linear.bias,
    }
    weights |= {f"model.model.{key}": value for key, value in network.denoiser.state_dict().items()}
    weights |= {f"pretransform.model.{key}": value for key, value in autoencoder.state_dict().items()}
    bottleneck = "pretransform.model.bottleneck"
    weights[f"{bottleneck}.scaling_factor"] = torch.ones(1, architecture.LATENT_DIM, 1)
    weights[f"{bottleneck}.bias"] = torch.zeros(1, architecture.LATENT_DIM, 1)
    weights[f"{bottleneck}.running_std"] = torch.ones(1)
    weights[f"{bottleneck}.noise_scaling_factor"] = torch.zeros(1, 0, 1)
    return weights


def _half(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.detach().half().contiguous() for key, value in weights.items()}
