"""Reads a checkpoint's `model_config.json`, or another JSON file, key by key. Errors name the path of unusable keys."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from stable_audio_serve.core.errors import CheckpointError

CONFIG_FILE = "model_config.json"
# Upper limits of config values. Without them, a damaged file could make the process build a network that exhausts
# memory before the weights are checked.
MAX_SIZE = 2**16
MAX_DEPTH = 2**10
MAX_TOKENS = 2**12  # of a prompt, and of a chunk of the autoencoder
MAX_SAMPLES = 2**28
MAX_NUMBER = 1e9
_MOST_CHARS = 255  # of a text, which may be the name of a file


class ConfigReader:
    """Reads typed values from one JSON object of a file. Getters raise CheckpointError that names an unusable key.

    A getter without `default` requires the key. A null in the file counts as absent. All readers of a file share one
    record of the keys that were read, so that `refuse_unread` can find keys that nothing has read.
    """

    def __init__(
        self, values: Mapping[str, Any], *, file: str = CONFIG_FILE, path: str = "", seen: set[str] | None = None
    ) -> None:
        self._values = values
        self._file = file  # as errors name it
        self._path = path
        self._seen: set[str] = set() if seen is None else seen

    def __contains__(self, key: str) -> bool:
        return self._values.get(key) is not None

    def section(self, key: str, *, optional: bool = False) -> ConfigReader:
        """Returns a reader of the object under `key`; a reader of {} if the key is absent and `optional`."""
        value = self._get(key, {} if optional else None)
        if not isinstance(value, Mapping):
            raise self.unusable(key, "an object")
        return ConfigReader(value, file=self._file, path=self.name(key), seen=self._seen)

    def sections(self, key: str) -> list[ConfigReader]:
        """Returns one reader for each object in the list under `key`."""
        value = self._get(key, None)
        if not isinstance(value, Sequence) or not all(isinstance(item, Mapping) for item in value):
            raise self.unusable(key, "a list of objects")
        return [
            ConfigReader(item, file=self._file, path=f"{self.name(key)}[{i}]", seen=self._seen)
            for i, item in enumerate(value)
        ]

    def integer(self, key: str, *, default: int | None = None, at_least: int = 1, at_most: int = MAX_SIZE) -> int:
        """Returns the value of `key`, a whole number from `at_least` to `at_most`."""
        value = self.number(key, default=default, at_least=at_least, at_most=math.inf)
        if value != int(value):
            raise self.unusable(key, "a whole number")
        if value > at_most:
            raise self.unusable(key, f"at most {at_most}")
        return int(value)

    def even(self, key: str, *, default: int) -> int:
        value = self.integer(key, default=default, at_least=2)
        if value % 2:
            raise self.unusable(key, "even")
        return value

    def number(
        self,
        key: str,
        *,
        default: float | None = None,
        at_least: float = -MAX_NUMBER,
        at_most: float = MAX_NUMBER,
    ) -> float:
        """Returns the value of `key`, a finite number from `at_least` to `at_most`."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not -math.inf < value < math.inf:
            raise self.unusable(key, "a number")
        if value < at_least:
            raise self.unusable(key, f"at least {at_least:g}")
        if value > at_most:
            raise self.unusable(key, f"at most {at_most:g}")
        return value

    def number_or_null(self, key: str, *, default: float) -> float | None:
        """Returns the value of `key`, or None if it is null in the file."""
        if self._values.get(key, default) is None:
            return None
        return self.number(key, default=default)

    def flag(self, key: str, *, default: bool) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self.unusable(key, "true or false")
        return value

    def text(self, key: str, *, default: str | None = None, most_chars: int = _MOST_CHARS) -> str:
        value = self._get(key, default)
        if not isinstance(value, str) or len(value) > most_chars:
            raise self.unusable(key, f"a string of at most {most_chars} characters")
        return value

    def choice(self, key: str, allowed: Sequence[str], *, default: str | None = None) -> str:
        value = self.text(key, default=default)
        if value not in allowed:
            raise self.unusable(key, "one of " + ", ".join(allowed))
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        value = self._get(key, [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.unusable(key, "a list of strings")
        return tuple(value)

    def integers(self, key: str, *, at_least: int = 1, at_most: int = MAX_SIZE) -> tuple[int, ...]:
        """Returns the value of `key`, a list of whole numbers from `at_least` to `at_most`."""
        value = self._get(key, None)
        whole = isinstance(value, list) and all(isinstance(v, int) and not isinstance(v, bool) for v in value)
        if not whole or not all(at_least <= v <= at_most for v in value):
            raise self.unusable(key, f"a list of whole numbers from {at_least} to {at_most}")
        return tuple(value)

    def plain(self, key: str) -> Mapping[str, Any] | None:
        """Returns the object under `key` as a plain mapping; None if the key is absent."""
        self._seen |= {self.name(key), self.name(key) + ".*"}
        return self.section(key)._values if key in self else None

    def require(self, **supported: Any) -> None:
        """Raise CheckpointError if a key is present with another value than the given one, the only supported value."""
        for key, value in supported.items():
            self._seen.add(self.name(key))
            if key in self and self._values[key] != value:
                found, only = json.dumps(self._values[key], default=str)[:80], json.dumps(value)
                raise CheckpointError(f"{self._file}: {self.name(key)} = {found} is not supported; only {only} is")

    def refuse_unread(self, *, inert: Collection[str]) -> None:
        """Raise CheckpointError for the first key that no getter has read, in this object or in objects inside it.

        Keys in `inert` are allowed at any depth, because they have no effect on inference.
        """
        for key, value in self._values.items():
            if value is None or key in inert:
                continue
            if self.name(key) not in self._seen:
                raise CheckpointError(
                    f"{self._file}: {self.name(key)} is not known here, so the model it asks for might be another one"
                )
            for reader in self._within(key):
                reader.refuse_unread(inert=inert)

    def _within(self, key: str) -> list[ConfigReader]:
        """Returns readers of the object or list of objects under `key`; none if `plain` has returned the value."""
        value = self._values[key]
        if self.name(key) + ".*" in self._seen:
            return []
        if isinstance(value, Mapping):
            return [self.section(key)]
        is_list = isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value)
        return self.sections(key) if is_list else []

    def refuse_unknown(self, known: Collection[str]) -> None:
        """Raise CheckpointError for the first key that is not in `known`. Keys whose value is null are ignored."""
        unknown = sorted(key for key in self._values if key in self and key not in known)
        if unknown:
            raise CheckpointError(f"{self._file}: {self.name(unknown[0])} is not known to this model family")

    def unusable(self, key: str, expected: str) -> CheckpointError:
        """Returns an error that states the expected and the found value of `key`."""
        found = json.dumps(self._values[key], default=str)[:80] if key in self else "nothing"
        return CheckpointError(f"{self._file}: {self.name(key)} must be {expected}, found {found}")

    def name(self, key: str) -> str:
        """Returns the full path of `key` in the file."""
        return f"{self._path}.{key}" if self._path else key

    def _get(self, key: str, default: Any) -> Any:
        self._seen.add(self.name(key))
        value = self._values.get(key)
        if value is not None:
            return value
        if default is None:
            raise CheckpointError(f"{self._file}: {self.name(key)} is missing")
        return default


def read_config(folder: Path) -> ConfigReader:
    """Returns the config of a checkpoint folder. Raises CheckpointError if it is missing or not a JSON object."""
    path = folder / CONFIG_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        # In the hub's cache, the files of a snapshot are links to a folder beside it.
        problem = "is a link to a file that does not exist" if path.is_symlink() else "does not exist"
        raise CheckpointError(f"{path} {problem}; a checkpoint folder needs a {CONFIG_FILE}") from None
    except (OSError, ValueError, RecursionError) as error:  # also numbers of too many digits, and endless nesting
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return ConfigReader(values)
