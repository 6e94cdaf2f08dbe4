"""Lists the files of a checkpoint (config, weights, text encoder, tokenizer) and checks that they are complete.

Reads only names and headers and does not import torch, so that a server can check the files before it starts anything.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from stable_audio_serve.core.errors import CheckpointError
from stable_audio_serve.models.config_reader import ConfigReader, read_config

WEIGHTS_FILE = "model.safetensors"
_USUAL_WEIGHTS = (WEIGHTS_FILE, "model.ckpt")
_WEIGHT_TYPES = (".safetensors", ".ckpt")
_NO_WEIGHTS = ("golden.safetensors",)  # not weights: reference values for verifying a checkpoint
_POINTER = b"version https://git-lfs"  # without Git LFS, `git clone` writes a small text in place of a large file
_MOST_NAMED = 5
TEXT_ENCODER_FOLDER = "t5gemma-b-b-ul2"
_SHARD_INDEX = "model.safetensors.index.json"
# For each type of prompt conditioner: the config keys that can name the text encoder's folder, and the default folder.
_ENCODER_KEYS = {
    "t5gemma": (("model_path", "subfolder", "model_name"), TEXT_ENCODER_FOLDER),
    "t5": (("t5_model_name",), "t5"),
}
_ENCODER_FILES = ((WEIGHTS_FILE, _SHARD_INDEX), ("tokenizer.json", "tokenizer.model"))


@dataclass(frozen=True, slots=True)
class FileList:
    """The files of a checkpoint's folder or repository. `place` names the folder or repository in error messages.

    `has(path)` returns whether a relative path is a file. `names` are the names of the files at the top level.
    """

    place: Path | str
    has: Callable[[str], bool]
    names: frozenset[str]

    def require(self, *alternatives: str, folder: str | None = None) -> None:
        """Raise CheckpointError unless one of the files `alternatives` exists in `folder` (None: the top level)."""
        if not any(self.has(f"{folder}/{name}" if folder else name) for name in alternatives):
            place = f"{self.place}/{folder}" if folder else self.place
            raise CheckpointError(f"{place} holds no {' or '.join(alternatives)}")


def list_folder(folder: Path) -> FileList:
    """Returns the files of a folder; an empty list if the folder does not exist."""
    paths = folder.iterdir() if folder.is_dir() else ()
    return FileList(
        folder, lambda name: (folder / name).is_file(), frozenset(path.name for path in paths if path.is_file())
    )


def list_repository(repo_id: str, paths: Collection[str]) -> FileList:
    """Returns the file list of the repository `repo_id`, whose files are `paths`."""
    return FileList(repo_id, frozenset(paths).__contains__, frozenset(path for path in paths if "/" not in path))


def find_weights(folder: Path) -> Path:
    """Returns a folder's weight file. Raises CheckpointError if none or more than one could be the weight file."""
    return folder / choose_weights(list_folder(folder))


def choose_weights(files: FileList) -> str:
    """Returns the name of the weight file.

    This is a file with one of the usual names. Without one, it is the only file with the suffix of a weight file,
    because fine-tunes use arbitrary names. Safetensors files are preferred to pickles. Raises CheckpointError if there
    is no candidate or more than one, or if the weights are in several files (shards).
    """
    for name in _USUAL_WEIGHTS:
        if name in files.names:
            return name
    if _SHARD_INDEX in files.names:
        raise CheckpointError(f"{files.place} holds weights in shards, which are not read: join them into one file")
    for suffix in _WEIGHT_TYPES:
        found = sorted(name for name in files.names if name.endswith(suffix) and name not in _NO_WEIGHTS)
        if len(found) > 1:
            listed = ", ".join(found[:_MOST_NAMED]) + (", ..." if len(found) > _MOST_NAMED else "")
            raise CheckpointError(
                f"{files.place} holds no {WEIGHTS_FILE}, and any of {len(found)} files could be meant ({listed}): put "
                f"one of them beside a model_config.json in a folder, and configure the folder's path"
            )
        if found:
            return found[0]
    raise CheckpointError(f"{files.place} holds no weights; expected {WEIGHTS_FILE}")


def find_text_encoder(folder: Path) -> Path | None:
    """Returns the text encoder's folder inside a checkpoint folder; None if the encoder has a separate repository.

    Raises CheckpointError, which names the searched folders, if the checkpoint should contain the encoder but does not.
    """
    encoder = _encoder_folder(read_config(folder), list_folder(folder))
    return None if encoder is None else folder / encoder


def text_encoder_repository(config: ConfigReader) -> tuple[str, str | None]:
    """Returns the repository of the text encoder, for a checkpoint that does not contain its text encoder.

    The second value is the text encoder's folder in the repository (None: the top level).
    """
    options = _encoder_options(config)
    if not is_open_family(config):
        return options.text("repo_id"), options.text("subfolder", default=TEXT_ENCODER_FOLDER)
    name = options.text("t5_model_name", default="t5-base")
    return (name if "/" in name else f"google-t5/{name}"), None


def is_open_family(config: ConfigReader) -> bool:
    """Whether the checkpoint encodes prompts with T5 (Stable Audio Open), not with T5Gemma (Stable Audio 3)."""
    return _text_conditioner(config).text("type") == "t5"


def check_layout(config: ConfigReader, files: FileList) -> str | None:
    """Check that every file needed for loading exists. Returns the text encoder's folder relative to the checkpoint.

    Returns None if the encoder has a separate repository (`text_encoder_repository`). Raises CheckpointError naming the
    first missing file.
    """
    choose_weights(files)
    encoder = _encoder_folder(config, files)
    if encoder is not None:
        check_encoder(files, folder=encoder)
    return encoder


def check_encoder(files: FileList, *, folder: str | None = None) -> None:
    """Raise CheckpointError if a text encoder file is missing in `folder` (None: the top level)."""
    for alternatives in _ENCODER_FILES:
        files.require(*alternatives, folder=folder)


def check_folder(folder: Path) -> None:
    """Raise CheckpointError if a file of a checkpoint folder is missing, truncated or a Git LFS pointer."""
    try:
        encoder = check_layout(read_config(folder), list_folder(folder))
        weights = [find_weights(folder), *(() if encoder is None else encoder_weights(folder / encoder))]
        for path in weights:
            with path.open("rb") as file:
                if file.read(len(_POINTER)) == _POINTER:
                    raise CheckpointError(f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull` there")
            if path.suffix == ".safetensors":
                _check_header(path)
    except OSError as error:
        raise CheckpointError(f"{error.filename or folder} cannot be read: {error.strerror or error}") from error


def damaged(path: Path, error: BaseException) -> CheckpointError:
    """Returns the error for a corrupt or truncated weight file."""
    return CheckpointError(f"{path} is corrupt or incomplete ({str(error) or type(error).__name__}); fetch it again")


def _encoder_folder(config: ConfigReader, files: FileList) -> str | None:
    names = encoder_folders(config)
    found = next((folder for folder in names if files.has(f"{folder}/config.json")), None)
    if found is None and not is_open_family(config) and "repo_id" not in _encoder_options(config):
        places = ", ".join(f"{files.place}/{folder}" for folder in names)
        raise CheckpointError(f"the text encoder was not found; looked for its config.json in {places}")
    return found


def _text_conditioner(config: ConfigReader) -> ConfigReader:
    """Returns the conditioner that encodes prompts. Raises CheckpointError if there is none."""
    conditioning = config.section("model").section("conditioning")
    for item in conditioning.sections("configs"):
        if item.text("type") in _ENCODER_KEYS:
            return item
    raise conditioning.unusable("configs", "a list with a conditioner of type " + " or ".join(_ENCODER_KEYS))


def _encoder_options(config: ConfigReader) -> ConfigReader:
    return _text_conditioner(config).section("config", optional=True)


def encoder_folders(config: ConfigReader) -> tuple[str, ...]:
    """Returns the folders where the text encoder may be, relative to the checkpoint, in order of preference."""
    keys, usual = _ENCODER_KEYS[_text_conditioner(config).text("type")]
    options = _encoder_options(config)
    names = [options.text(key) for key in keys if key in options]
    return tuple(dict.fromkeys(part for name in (*names, usual) for part in (name, Path(name).name)))


def encoder_weights(folder: Path) -> Iterator[Path]:
    """Yield the text encoder's weight file, which may be missing, or all files that its index lists.

    Raises CheckpointError if one of the listed files is missing.
    """
    if (folder / WEIGHTS_FILE).is_file() or not (folder / _SHARD_INDEX).is_file():
        yield folder / WEIGHTS_FILE
        return
    try:
        shards = sorted(set(json.loads((folder / _SHARD_INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        if not all(isinstance(name, str) for name in shards):
            raise TypeError("weight_map must contain names of files")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(folder / _SHARD_INDEX, error) from error
    files = list_folder(folder)
    for name in shards:
        if not files.has(name):
            raise CheckpointError(f"{folder} holds no {name}, which its {_SHARD_INDEX} names")
        yield folder / name


def _check_header(path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy"):  # raises an error if the file is shorter than its header says
            pass
    except SafetensorError as error:
        raise damaged(path, error) from error
