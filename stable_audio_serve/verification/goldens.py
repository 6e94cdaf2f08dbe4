"""Reads a folder of reference numbers: facts in golden.json, tensors by `<group>/<name>` in golden.safetensors.

Raises CheckpointError if a file, key or value is missing or malformed.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from stable_audio_serve.core.errors import CheckpointError

FACTS_FILE = "golden.json"
TENSORS_FILE = "golden.safetensors"
_WHERE = "Reference numbers are in tests/data/goldens of a source checkout; the installed package has none."


class Goldens:
    """The reference numbers of one folder. Records which tensors were read, so that unread ones can be reported."""

    def __init__(self, facts: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.facts = facts
        self._tensors = tensors
        self._used: set[str] = set()

    @classmethod
    def load(cls, folder: Path) -> Goldens:
        """Read both files. Raises CheckpointError that names the unusable file."""
        path = folder / FACTS_FILE
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
            path = folder / TENSORS_FILE
            return cls(dict(facts), load_file(path))
        except FileNotFoundError as error:
            raise CheckpointError(f"{path}: file not found. {_WHERE}") from error
        except (OSError, ValueError, TypeError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error

    def __getitem__(self, key: str) -> Tensor:
        """Returns the tensor `key`. Floating-point tensors become float32; other types stay."""
        if key not in self._tensors:
            raise CheckpointError(f"{TENSORS_FILE} has no {key}")
        self._used.add(key)
        tensor = self._tensors[key]
        return tensor.float() if tensor.is_floating_point() else tensor

    def find(self, key: str) -> Tensor | None:
        return self[key] if key in self._tensors else None

    def matching(self, pattern: str) -> list[re.Match[str]]:
        """Returns a match per key that the regular expression `pattern` matches in full, sorted. Marks them as read."""
        matches = [match for key in sorted(self._tensors) if (match := re.fullmatch(pattern, key))]
        self._used |= {match[0] for match in matches}
        return matches

    def section(self, *path: str) -> dict[str, Any]:
        """Returns the object at `path` in the facts, empty if absent."""
        found = self.facts
        for part in path:
            found = found.get(part, {})
            if not isinstance(found, dict):
                raise CheckpointError(f"{FACTS_FILE}: {'.'.join(path)} must be an object")
        return found

    def unused(self) -> dict[str, list[str]]:
        """Returns the keys of the tensors that were never read, by group."""
        groups: dict[str, list[str]] = {}
        for key in sorted(self._tensors.keys() - self._used):
            groups.setdefault(key.split("/")[0], []).append(key)
        return groups
