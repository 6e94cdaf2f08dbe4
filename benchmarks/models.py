"""The settings of the benchmark cases, and the models that they measure: loaded, or built at official sizes with random
weights.

The output of random weights is noise. Therefore no model name of a server refers to such a model. Also writes random
adapters.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from stable_audio_serve.core.catalog import OPEN_FAMILY, DecodePrecision
from stable_audio_serve.core.generation import Lora, Mode
from stable_audio_serve.models.adapters.base import adaptable_layers
from stable_audio_serve.models.config_reader import ConfigReader
from stable_audio_serve.models.families import load_model
from stable_audio_serve.models.precision import resolve_decode_precision
from stable_audio_serve.models.protocol import AdaptableModel, DiffusionModel
from stable_audio_serve.models.registry import BUILT_IN, ModelEntry, complete_card, resolve_entry
from stable_audio_serve.models.sa3 import build as sa3
from stable_audio_serve.models.sa3.config import parse_config as parse_sa3
from stable_audio_serve.models.sa3.model import Sa3Model
from stable_audio_serve.models.sa3.t5gemma import T5GemmaEncoder
from stable_audio_serve.models.sao import build as sao
from stable_audio_serve.models.sao.config import parse_config as parse_open
from stable_audio_serve.models.sao.model import SaoModel
from stable_audio_serve.models.sao.t5 import T5Encoder
from stable_audio_serve.models.text_encoder import EncoderNetwork, TextEncoder
from stable_audio_serve.models.weights import cast_network, require_exact_float32

GOLDENS = Path(__file__).parents[1] / "tests" / "data" / "goldens"  # small reference checkpoints
# Beginning of a model's name -> the reference checkpoint with networks of the same kind.
_REFERENCES = {
    "small": "sa3/sharp-s",
    "medium": "sa3/sharp-l",
    "stable-audio-open-1.0": "sao/tiny-1.0",
    "stable-audio-open-small": "sao/tiny-small",
}
_RANK = 16  # of random adapters


@dataclass(frozen=True, slots=True)
class CaseSettings:
    """The settings of all benchmark cases.

    `model` is a registered name or a checkpoint folder. None selects the demo model. `threads` is the model's number of
    CPU threads. `mode` is the engine's mode, strict or fast. None selects the device's default. If `full` is true, a
    case sends as many requests as published figures need. Otherwise it takes only minutes. The case `ggml` uses
    `binary`, the program of sa3.cpp, and `weights`, a folder of weights.
    """

    model: str | None = None
    device: str = "cpu"
    mode: Mode | None = None
    threads: int = 1
    rounds: int = 3
    full: bool = False
    binary: str | None = None
    weights: str | None = None


def load(settings: CaseSettings) -> DiffusionModel:
    """Returns the model to measure, on its device."""
    return load_model(resolve_model(settings.model), device=settings.device)


def resolve_model(name: str | None) -> ModelEntry:
    """Returns the registry entry of a model name or a checkpoint folder. None means the demo model."""
    name = name or "demo"
    return resolve_entry(Path(name).name, path=name) if Path(name).is_dir() else resolve_entry(name)


def write_adapters(model: DiffusionModel, folder: Path, *, count: int) -> list[Lora]:
    """Write random adapters of rank 16, and return them. They change all layers that run in every denoising step."""
    loras: list[Lora] = []
    for number in range(count):
        assert isinstance(model, AdaptableModel)
        random, tensors = torch.Generator().manual_seed(number), {}
        for name, layer in adaptable_layers(model.adaptable).items():
            key, (out, width) = f"{name}.parametrizations.weight.0", layer.weight.flatten(1).shape
            if model.runs_in_steps(name):
                tensors[f"{key}.lora_A"] = 0.1 * torch.randn(_RANK, width, generator=random) / width**0.5
                tensors[f"{key}.lora_B"] = torch.randn(out, _RANK, generator=random) / _RANK**0.5
        path = folder / f"random-{number}.safetensors"
        save_file(tensors, path)
        loras.append(Lora(path.stem, source=str(path), sha256=hashlib.sha256(path.read_bytes()).hexdigest()))
    return loras


def build_random_model(
    name: str, *, device: str | torch.device, dtype: torch.dtype, decode_precision: DecodePrecision | None = None
) -> Sa3Model | SaoModel:
    """Build the built-in model `name` at its real size on `device`, with random weights.

    `dtype` and `decode_precision` are used as in `load_sa3`. The tokenizer maps every word to the unknown token.
    """
    require_exact_float32()
    target = torch.device(device)
    torch.manual_seed(0)
    entry, reader = BUILT_IN[name], ConfigReader(official_config(name))
    is_open = entry.card.family == OPEN_FAMILY
    config: Any = parse_open(reader) if is_open else parse_sa3(reader)
    with target, torch.no_grad():
        text = _random_text_encoder(config.prompt.max_length, is_open=is_open)
        components: Any = (sao if is_open else sa3).build_components(config, text)
    for module in components.modules:
        module.eval().requires_grad_(False)
    cast_network(components.denoiser, dtype)
    precision = resolve_decode_precision(target, decode_precision, dtype=dtype)
    if is_open:
        spec = sao.build_spec(complete_card(entry.card, reader, cap_s=entry.cap_s), config)
        return SaoModel(components, config=config, spec=spec, device=target, decode_precision=precision)
    spec = sa3.build_spec(complete_card(entry.card, reader, cap_s=entry.cap_s), config, components=components)
    return Sa3Model(components, config=config, spec=spec, device=target, decode_precision=precision)


def official_config(name: str) -> dict[str, Any]:
    """Returns the `model_config.json` of a small reference checkpoint with the sizes of a built-in model."""
    checkpoint = next(folder for start, folder in _REFERENCES.items() if name.startswith(start))
    config: dict[str, Any] = json.loads((GOLDENS / checkpoint / "model_config.json").read_text())
    config["sample_rate"] = 44_100
    if checkpoint.startswith("sao/"):
        _resize_open(config, small="small" in name)
    else:
        _resize_sa3(config, small="small" in name, is_base=name.endswith("-base"))
    return config


def _resize_sa3(config: dict[str, Any], *, small: bool, is_base: bool) -> None:
    model = config["model"]
    config["sample_size"] = (5_324_800 if is_base else 5_292_032) if small else 16_777_216
    model["io_channels"] = 256
    model["conditioning"]["configs"][0]["config"]["max_length"] = 256
    model["diffusion"]["diffusion_objective"] = "rectified_flow" if is_base else "rf_denoiser"
    model["diffusion"]["config"] |= {"io_channels": 256, "local_add_cond_dim": 257, "num_memory_tokens": 64}
    model["diffusion"]["config"] |= (
        {"embed_dim": 1024, "depth": 20, "num_heads": 16}
        if small
        else {"embed_dim": 1536, "depth": 24, "num_heads": 24}
    )
    autoencoder = model["pretransform"]["config"]
    autoencoder |= {"latent_dim": 256, "downsampling_ratio": 4096}
    autoencoder["bottleneck"]["config"]["dim"] = 256
    autoencoder["pretransform"]["config"]["patch_size"] = 256
    for part, waves in (("encoder", "in_channels"), ("decoder", "out_channels")):
        coder = autoencoder[part]["config"]
        coder |= {waves: 512, "c_mults": [6], "dim_heads": 64, "latent_dim": 256}
        coder |= (
            {"channels": 128, "transformer_depths": [6]} if small else {"channels": 256, "transformer_depths": [12]}
        )
    autoencoder["decoder"]["config"]["sinusoidal_blocks"] = [0 if small else 8]


def _resize_open(config: dict[str, Any], *, small: bool) -> None:
    model = config["model"]
    config["sample_size"] = 524_288 if small else 2_097_152
    model["io_channels"] = 64
    model["conditioning"]["cond_dim"] = 768
    model["conditioning"]["configs"][0]["config"]["max_length"] = 64 if small else 128
    model["diffusion"]["config"] |= {"io_channels": 64, "cond_token_dim": 768}
    model["diffusion"]["config"] |= (
        {"embed_dim": 1024, "depth": 16, "num_heads": 8, "global_cond_dim": 768}
        if small
        else {"embed_dim": 1536, "depth": 24, "num_heads": 24, "global_cond_dim": 1536}
    )
    autoencoder = model["pretransform"]["config"]
    autoencoder |= {"latent_dim": 64, "downsampling_ratio": 2048}
    for part, width in (("encoder", 128), ("decoder", 64)):
        coder = autoencoder[part]["config"]
        coder |= {"channels": 128, "c_mults": [1, 2, 4, 8, 16], "strides": [2, 4, 4, 8, 8], "latent_dim": width}


def _random_text_encoder(max_length: int, *, is_open: bool) -> TextEncoder:
    """Build a text encoder of the official size: T5-base in float16, or T5Gemma in bfloat16."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    if is_open:
        encoder: EncoderNetwork = T5Encoder(
            ConfigReader({"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12})
        )
    else:
        widths = {"hidden_size": 768, "intermediate_size": 2048, "head_dim": 64, "query_pre_attn_scalar": 64}
        heads = {"num_attention_heads": 12, "num_key_value_heads": 12, "num_hidden_layers": 12}
        encoder = T5GemmaEncoder(ConfigReader(widths | heads))
    encoder.to(torch.get_default_device())  # rotary frequencies are computed on the CPU
    cast_network(encoder.eval().requires_grad_(False), torch.float16 if is_open else torch.bfloat16)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<pad>": 0, "<unk>": 1}, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>")
    return TextEncoder(tokenizer, encoder, width=768, max_length=max_length)
