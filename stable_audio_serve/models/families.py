"""Loads a model registry entry: finds or downloads its files and calls the loader of its model family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from stable_audio_serve.core.catalog import OPEN_FAMILY, SA3_FAMILY, NetworkBackend
from stable_audio_serve.core.errors import ConfigError
from stable_audio_serve.models.checkpoint_files import check_encoder, is_open_family, list_folder
from stable_audio_serve.models.compiled import compile_layers
from stable_audio_serve.models.config_reader import ConfigReader
from stable_audio_serve.models.download import download_entry, download_text_encoder
from stable_audio_serve.models.precision import resolve_decode_precision
from stable_audio_serve.models.protocol import DiffusionModel
from stable_audio_serve.models.registry import ModelEntry, describe_entry
from stable_audio_serve.models.sa3.autoencoder import AudioAutoencoder
from stable_audio_serve.models.sa3.build import load_sa3
from stable_audio_serve.models.sa3.config import INERT_KEYS
from stable_audio_serve.models.sa3.config import parse_config as parse_sa3
from stable_audio_serve.models.sao.build import load_sao
from stable_audio_serve.models.sao.config import parse_config as parse_sao
from stable_audio_serve.models.stable_audio_tools.build import load_with_package
from stable_audio_serve.models.stable_audio_tools.config import parse_inputs
from stable_audio_serve.models.stable_audio_tools.package import require_open_family
from stable_audio_serve.models.weight_sizes import weight_bytes
from stable_audio_serve.models.weights import SkipRandomWeights, resolve_dtype

_LOADERS: Mapping[str, Callable[..., DiffusionModel]] = {SA3_FAMILY: load_sa3, OPEN_FAMILY: load_sao}


def load_model(
    entry: ModelEntry,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    decode_precision: str | None = None,
    compile: bool = False,
    token: str | None = None,
    check_size: Callable[[int], None] | None = None,
) -> DiffusionModel:
    """Load `entry` onto `device`.

    `dtype` is the denoiser's precision (see `resolve_dtype`). `decode_precision` is the precision of matrix products
    and convolutions in the decoder (see `resolve_decode_precision`). `compile` compiles the denoiser's layers.
    `check_size` is called with the size of the weights in bytes before they are loaded; it may raise an error.

    Takes seconds to minutes; downloads missing files. Raises CheckpointError with one sentence that says what to do,
    and ConfigError for a device or precision that cannot be used.
    """
    target = resolve_device(device)
    precision = resolve_dtype(target, dtype)
    decoding = resolve_decode_precision(target, decode_precision, dtype=precision)
    folder, text_encoder = find_files(entry, token=token)
    check_encoder(replace(list_folder(text_encoder), place=f"the text encoder in {text_encoder}"))
    card = describe_entry(replace(entry, folder=str(folder))).card
    load = _LOADERS[card.family]
    if entry.backend == "stable_audio_tools":
        require_open_family(card.family)
        load = load_with_package
    if check_size is not None:
        check_size(weight_bytes(folder, text_encoder=text_encoder, dtype=precision))
    model = load(card, folder, text_encoder=text_encoder, device=target, dtype=precision, decode_precision=decoding)
    return compile_layers(model) if compile else model


def find_files(entry: ModelEntry, *, token: str | None = None) -> tuple[Path, Path]:
    """Returns the folders of an entry's checkpoint and of its text encoder; downloads missing files.

    Raises CheckpointError with one sentence that says what to do.
    """
    if entry.folder is not None:
        folder = Path(entry.folder)
    else:
        folder = download_entry(entry, token=token, check_config=partial(check_config, backend=entry.backend))
    return folder, download_text_encoder(folder, token=token)


def check_config(config: ConfigReader, *, backend: NetworkBackend) -> None:
    """Raise CheckpointError for a key of a `model_config.json` that cannot be used. Takes milliseconds."""
    if backend == "stable_audio_tools":
        parse_inputs(config)
    elif is_open_family(config):
        parse_sao(config)
    else:
        autoencoder = parse_sa3(config).autoencoder
        with suppress(RuntimeError, MemoryError), torch.device("meta"), SkipRandomWeights():  # `load_sa3` reports these
            AudioAutoencoder(autoencoder)
            config.refuse_unread(inert=INERT_KEYS)


def resolve_device(device: str | torch.device) -> torch.device:
    """Returns `device` as a torch.device. Raises ConfigError if this machine cannot use the device."""
    try:
        probe = torch.ones(1, device=device)  # runs a kernel, because torch has none for some GPUs
        probe.item()  # waits for the kernel
        return probe.device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device {str(device)!r} cannot be used here: {reason}", field="device") from error
