"""Which files a checkpoint consists of: config, weights, text encoder, tokenizer; and whether they are complete.

Looks at names and headers only and imports no torch, so that a server can check them before it starts anything.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from stable_audio_serve.core.errors import CheckpointError
from stable_audio_serve.models.config_reader import ConfigReader, read_config

WEIGHTS_FILE = "model.safetensors"
WEIGHT_FILES = (WEIGHTS_FILE, "model.ckpt")
TEXT_ENCODER_FOLDER = "t5gemma-b-b-ul2"
_SHARD_INDEX = "model.safetensors.index.json"
# By type of conditioner: the config's keys that name the encoder, and the folder where it lies if none does.
_ENCODER_KEYS = {
    "t5gemma": (("model_path", "subfolder", "model_name"), TEXT_ENCODER_FOLDER),
    "t5": (("t5_model_name",), "t5"),
}
_ENCODER_FILES = ((WEIGHTS_FILE, _SHARD_INDEX), ("tokenizer.json", "tokenizer.model"))


def find_weights(folder: Path) -> Path:
    """Returns a folder's weight file, safetensors before pickles. Raises CheckpointError when there is none."""
    return folder / _weights(_in_folder(folder), place=folder)


def find_text_encoder(folder: Path) -> Path | None:
    """Returns the encoder's folder: where the config points, else beside the weights; None if it lies elsewhere.

    Raises CheckpointError naming the places looked at.
    """
    encoder = _encoder_folder(read_config(folder), _in_folder(folder), place=folder)
    return None if encoder is None else folder / encoder


def text_encoder_repository(config: ConfigReader) -> str:
    """Returns the repository of the text encoder that a config names and its checkpoint does not hold."""
    conditioner = _text_conditioner(config)
    name = conditioner.section("config", optional=True).text("t5_model_name", default="t5-base")
    return name if "/" in name else f"google-t5/{name}"


def is_open_family(config: ConfigReader) -> bool:
    """Whether a config is one of the Stable Audio Open family: its prompts go through a T5, not through a T5Gemma."""
    return _text_conditioner(config).text("type") == "t5"


def check_layout(config: ConfigReader, has: Callable[[str], bool], *, place: Path | str) -> str | None:
    """Returns the text encoder's folder, relative to the checkpoint, when every file that loading needs is there.

    None stands for an encoder in a repository of its own (`text_encoder_repository`). `has` tells whether `place`,
    which errors name, holds a file. Raises CheckpointError naming the first one missing.
    """
    _weights(has, place=place)
    encoder = _encoder_folder(config, has, place=place)
    if encoder is not None:
        check_encoder(lambda name: has(f"{encoder}/{name}"), place=f"{place}/{encoder}")
    return encoder


def check_encoder(has: Callable[[str], bool], *, place: Path | str) -> None:
    """Raise CheckpointError when a file of a text encoder is missing."""
    for alternatives in _ENCODER_FILES:
        if not any(has(name) for name in alternatives):
            raise CheckpointError(f"{place} holds no {' or '.join(alternatives)}")


def check_folder(folder: Path) -> None:
    """Raise CheckpointError when a file of a checkpoint folder is missing or is cut short."""
    try:
        encoder = check_layout(read_config(folder), _in_folder(folder), place=folder)
        weights = [find_weights(folder), *(() if encoder is None else _encoder_weights(folder / encoder))]
        for path in weights:
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


def _encoder_folder(config: ConfigReader, has: Callable[[str], bool], *, place: Path | str) -> str | None:
    names = _encoder_names(_text_conditioner(config))
    found = next((folder for folder in names if has(f"{folder}/config.json")), None)
    if found is None and not is_open_family(config):
        places = ", ".join(f"{place}/{folder}" for folder in names)
        raise CheckpointError(f"the text encoder was not found; looked for its config.json in {places}")
    return found


def _text_conditioner(config: ConfigReader) -> ConfigReader:
    """Returns the conditioner that encodes prompts. Raises CheckpointError when there is none."""
    conditioning = config.section("model").section("conditioning")
    for item in conditioning.sections("configs"):
        if item.text("type") in _ENCODER_KEYS:
            return item
    raise conditioning.unusable("configs", "a list with a conditioner of type " + " or ".join(_ENCODER_KEYS))


def _encoder_names(conditioner: ConfigReader) -> tuple[str, ...]:
    """Returns where a text conditioner may keep its encoder, relative to the checkpoint, best first."""
    keys, usual = _ENCODER_KEYS[conditioner.text("type")]
    config = conditioner.section("config", optional=True)
    names = [config.text(key) for key in keys if key in config]
    return tuple(dict.fromkeys(part for name in (*names, usual) for part in (name, Path(name).name)))


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
