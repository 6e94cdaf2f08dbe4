"""Builds a model with the networks of the package stable-audio-tools from a checkpoint folder and a T5 folder."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stable_audio_serve.core.catalog import DecodePrecision, ModelCard
from stable_audio_serve.core.errors import CheckpointError
from stable_audio_serve.models.checkpoint_files import find_weights
from stable_audio_serve.models.conditioners import PromptConfig
from stable_audio_serve.models.config_reader import CONFIG_FILE, MAX_SAMPLES, ConfigReader, read_config
from stable_audio_serve.models.protocol import ModelSpec
from stable_audio_serve.models.sao.conditioners import load_text_encoder
from stable_audio_serve.models.sao.config import OBJECTIVE_SAMPLERS, SHIFT_KEY
from stable_audio_serve.models.sao.planning import read_shift
from stable_audio_serve.models.stable_audio_tools.config import Inputs, parse_inputs
from stable_audio_serve.models.stable_audio_tools.model import PackageModel
from stable_audio_serve.models.stable_audio_tools.package import import_package
from stable_audio_serve.models.text_encoder import TextEncoder, stating_width
from stable_audio_serve.models.weights import (
    SkipRandomWeights,
    load_weights,
    require_exact_float32,
)
from stable_audio_serve.models.windows import WINDOW_FRAMES

_TEXT_DTYPE = torch.float16  # dtype of the text encoder on every device, as in the package


def load_with_package(
    card: ModelCard,
    folder: Path,
    *,
    text_encoder: Path,
    device: torch.device,
    dtype: torch.dtype,
    decode_precision: DecodePrecision = "float32",
) -> PackageModel:
    """Load the checkpoint and the text encoder with the package's networks.

    The diffusion network has the dtype `dtype`, the text encoder float16, and the other networks float32. The keys of
    the weight file must match the networks. Raises CheckpointError, which names the file or key, if not. Also raises it
    if the package is missing; the message says how to install it.
    """
    import_package()
    require_exact_float32()
    config = read_config(folder)
    inputs, weights_file = parse_inputs(config), find_weights(folder)
    shift = read_shift(config.section("model").section("diffusion").plain(SHIFT_KEY))
    text = load_text_encoder(text_encoder, max_length=inputs.prompt.max_length, device=device, dtype=_TEXT_DTYPE)
    wrapper = build_wrapper(config, inputs, text=text)
    with stating_width(text, text_encoder):
        load_weights({"": wrapper}, weights_file, device=device)
    _cast(wrapper.model, dtype)
    spec = build_spec(card, config, wrapper=wrapper)
    if spec.max_frames < WINDOW_FRAMES:
        wrapper.pretransform.chunked = False  # the package raises an error if a clip is shorter than its windows
    return PackageModel(
        wrapper,
        inputs=inputs,
        spec=replace(spec, dtype=dtype),
        shift=shift,
        device=device,
        decode_precision=decode_precision,
    )


def build_wrapper(config: ConfigReader, inputs: Inputs, *, text: TextEncoder) -> Any:
    """Returns the package's module for a `model_config.json`, with `text` as text encoder and uninitialised weights.

    Raises CheckpointError with the package's message if the package cannot build the config.
    """
    models = import_package()
    values = _values(config)
    conditioning = values["model"]["conditioning"]
    conditioning["configs"] = [item for item in conditioning["configs"] if item["id"] != inputs.prompt.id]
    try:
        with SkipRandomWeights():
            wrapper = models.factory.create_model_from_config(values)
            prompt = _prompt_conditioner(inputs.prompt, text=text)
            wrapper.conditioner.conditioners[inputs.prompt.id] = prompt
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{CONFIG_FILE} describes what stable-audio-tools cannot build: {reason}") from error
    return wrapper.eval().requires_grad_(False)


def build_spec(card: ModelCard, config: ConfigReader, *, wrapper: Any) -> ModelSpec:
    """Returns the model's spec. Raises CheckpointError naming a config key that contradicts the networks."""
    sample_size = config.integer("sample_size", at_most=MAX_SAMPLES)
    hop = int(wrapper.pretransform.downsampling_ratio)
    frames, multiple = sample_size // hop, int(wrapper.min_input_length) // hop
    if frames < 1 or frames % multiple:
        raise config.unusable("sample_size", f"{multiple} times {hop} samples, or a multiple of that")
    for reader, key, found in (
        (config, "audio_channels", int(wrapper.pretransform.io_channels)),
        (config.section("model"), "io_channels", int(wrapper.pretransform.encoded_channels)),
    ):
        if reader.integer(key, default=2) != found:
            raise reader.unusable(key, f"{found}, as the autoencoder makes")
    return ModelSpec(
        card=card,
        hop=hop,
        max_frames=frames,
        tail_samples=sample_size - frames * hop,
        default_sampler=OBJECTIVE_SAMPLERS[card.objective],
        noisy_source_encoder=True,  # the safe assumption: whether the package's encoder draws noise is unknown
        pads_rows=False,
    )


def _cast(network: nn.Module, dtype: torch.dtype) -> None:
    """Cast a network in place, except for its rotary frequencies: positions would multiply their rounding errors."""
    kept = [(part, part.inv_freq) for part in network.modules() if isinstance(getattr(part, "inv_freq", None), Tensor)]
    network.to(dtype)
    for part, frequencies in kept:
        part.inv_freq = frequencies


def _values(config: ConfigReader) -> dict[str, Any]:
    """Returns a copy of the config, because the package removes keys from its argument."""
    return {
        "model_type": config.text("model_type"),
        "sample_size": config.integer("sample_size", at_most=MAX_SAMPLES),
        "sample_rate": config.integer("sample_rate", at_most=MAX_SAMPLES),
        "model": deepcopy(dict(config.plain("model") or {})),
    }


def _prompt_conditioner(config: PromptConfig, *, text: TextEncoder) -> nn.Module:
    """Returns the package's prompt conditioner around a loaded text encoder.

    The package's constructor would download the encoder by name, accepts only some names, and would leave missing
    weights random.
    """
    conditioners = import_package().conditioners
    prompt: Any = conditioners.T5Conditioner.__new__(conditioners.T5Conditioner)
    conditioners.Conditioner.__init__(prompt, text.width, config.width, project_out=config.project_out)
    prompt.tokenizer, prompt.max_length = text.tokenizer, text.max_length
    prompt.enable_grad = False
    prompt.__dict__["model"] = _Network(text)  # bypasses module registration, as in the package
    return prompt


class _Network(nn.Module):
    """A text encoder with the interface of transformers' networks."""

    def __init__(self, text: TextEncoder) -> None:
        super().__init__()
        self.text, self.encoder = text, text.encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        return {"last_hidden_state": self.text.encode(input_ids, attention_mask)}
