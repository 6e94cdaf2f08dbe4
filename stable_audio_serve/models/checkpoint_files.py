"""Which files a checkpoint consists of: config, weights, text encoder, tokenizer; and whether they are complete.

Looks at names and headers only and imports no torch, so that a server can check them before it starts anything.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from stable_audio_serve.core.errors import CheckpointError
from stable_audio_serve.models.config_reader import ConfigReader, read_config

WEIGHTS_FILE = "model.safetensors"
WEIGHT_FILES = (WEIGHTS_FILE, "model.ckpt")
TEXT_ENCODER_FOLDER = "t5gemma-b-b-ul2"
_SHARD_INDEX = "model.safetensors.index.json"
_ENCODER_FILES = ((WEIGHTS_FILE, _SHARD_INDEX), ("tokenizer.json", "tokenizer.model"))


def find_weights(folder: Path) -> Path:
    """Returns a folder's weight file, safetensors before pickles. Raises CheckpointError when there is none."""
    return folder / _weights(_in_folder(folder), place=folder)


def find_text_encoder(folder: Path, names: Sequence[str]) -> Path:
    """Returns the encoder's folder: where the config points (`names`), else beside the weights.

    Raises CheckpointError naming the places looked at.
    """
    return folder / _encoder_folder(names, _in_folder(folder), place=folder)


def encoder_names(conditioner: ConfigReader) -> tuple[str, ...]:
    """Returns where the config's text conditioner may keep its encoder, relative to the checkpoint, best first."""
    config = conditioner.section("config", optional=True)
    return tuple(config.text(key) for key in ("model_path", "subfolder", "model_name") if key in config)


def check_layout(config: ConfigReader, has: Callable[[str], bool], *, place: Path | str) -> str:
    """Returns the text encoder's folder, relative to the checkpoint, when every file that loading needs is there.

    `has` tells whether `place`, which errors name, holds a file. Raises CheckpointError naming the first one missing.
    """
    _weights(has, place=place)
    conditioners = config.section("model").section("conditioning").sections("configs")
    names = [name for item in conditioners if item.text("type") == "t5gemma" for name in encoder_names(item)]
    encoder = _encoder_folder(names, has, place=place)
    for alternatives in _ENCODER_FILES:
        if not any(has(f"{encoder}/{name}") for name in alternatives):
            raise CheckpointError(f"{place}/{encoder} holds no {' or '.join(alternatives)}")
    return encoder


def check_folder(folder: Path) -> None:
    """Raise CheckpointError when a file of a checkpoint folder is missing or is cut short."""
    try:
        encoder = check_layout(read_config(folder), _in_folder(folder), place=folder)
        for path in (find_weights(folder), *_encoder_weights(folder / encoder)):
            if path.suffix == ".safetensors":
                _check_header(path)
    except OSError as error:
        raise CheckpointError(f"{error.filename or folder} cannot be read: {error.strerror or error}") from error


def damaged(path: Path, error: Exception) -> CheckpointError:
    """Returns the error for a weight file that is not whole."""
    return CheckpointError(f"{path} is corrupt or incomplete ({error}); fetch it again")


def _weights(has: Callable[[str], bool], *, place: Path | str) -> str:
    found = next(filter(has, WEIGHT_FILES), None)
    if found is None:
        raise CheckpointError(f"{place} holds no weights; expected {WEIGHTS_FILE}")
    return found


def _encoder_folder(names: Sequence[str], has: Callable[[str], bool], *, place: Path | str) -> str:
    tried = dict.fromkeys(part for name in (*names, TEXT_ENCODER_FOLDER) for part in (name, Path(name).name))
    for folder in tried:
        if has(f"{folder}/config.json"):
            return folder
    places = ", ".join(f"{place}/{folder}" for folder in tried)
    raise CheckpointError(f"the text encoder was not found; looked for its config.json in {places}")


def _encoder_weights(folder: Path) -> Iterator[Path]:
    """Yields the encoder's weight file, or all that its index names. Raises CheckpointError when one is missing."""
    if (folder / WEIGHTS_FILE).is_file():
        yield folder / WEIGHTS_FILE
        return
    try:
        shards = sorted(set(json.loads((folder / _SHARD_INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(folder / _SHARD_INDEX, error) from error
    for name in shards:
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} holds no {name}, which its {_SHARD_INDEX} names")
        yield folder / name


def _check_header(path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy"):  # compares the size of the file with what its header says
            pass
    except SafetensorError as error:
        raise damaged(path, error) from error


def _in_folder(folder: Path) -> Callable[[str], bool]:
    return lambda name: (folder / name).is_file()
