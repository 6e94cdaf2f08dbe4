"""A folder of reference numbers: facts in golden.json, tensors by `<group>/<name>` in golden.safetensors.

Knows the files and their layout, not what the numbers mean. Everything missing or malformed is a CheckpointError.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from stable_audio_serve.core.errors import CheckpointError

FACTS_FILE = "golden.json"
TENSORS_FILE = "golden.safetensors"
_WHERE = "Reference numbers are in tests/data/goldens of a source checkout; the installed package has none."


class Goldens:
    """The numbers of one folder; records which were read, so that the others can be reported."""

    def __init__(self, facts: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.facts = facts
        self._tensors = tensors
        self._used: set[str] = set()

    @classmethod
    def load(cls, folder: Path) -> Goldens:
        """Read both files. Raises CheckpointError naming the file."""
        path = folder / FACTS_FILE
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise CheckpointError(f"{path}: file not found. {_WHERE}") from error
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise CheckpointError(f"{path} cannot be read as JSON: {reason}") from error
        if not isinstance(facts, dict):
            raise CheckpointError(f"{path} must hold a JSON object")
        path = folder / TENSORS_FILE
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read as safetensors: {error}") from error
        return cls(facts, tensors)

    def __contains__(self, key: str) -> bool:
        return key in self._tensors

    def __getitem__(self, key: str) -> Tensor:
        """Returns the tensor `key`; integers keep their type, everything else is float32."""
        if key not in self._tensors:
            raise CheckpointError(f"{TENSORS_FILE} has no {key}")
        self._used.add(key)
        tensor = self._tensors[key]
        return tensor.float() if tensor.is_floating_point() else tensor

    def find(self, key: str) -> Tensor | None:
        return self[key] if key in self._tensors else None

    def names(self, prefix: str) -> list[str]:
        """Returns the names below `prefix`, without it."""
        return sorted(key.removeprefix(prefix) for key in self._tensors if key.startswith(prefix))

    def component(self, name: str) -> dict[str, Any]:
        """Returns what the facts say about a component, empty if absent."""
        found = self.section("components").get(name, {})
        if not isinstance(found, dict):
            raise CheckpointError(f"{FACTS_FILE}: components.{name} must be an object")
        return found

    def rounding(self) -> dict[str, float]:
        """Returns how far rounding of the weights moves a stored number, by its key, where that is stated."""
        for place, stated in (
            ("components.rounding.max_abs", self.component("rounding").get("max_abs", {})),
            ("rounding.worst_cases", self.section("rounding").get("worst_cases", {})),
        ):
            if not isinstance(stated, dict) or not all(isinstance(value, int | float) for value in stated.values()):
                raise CheckpointError(f"{FACTS_FILE}: {place} must be an object of numbers")
            if stated:
                return {key: float(value) for key, value in stated.items()}
        return {}

    def listed(self, name: str) -> list[dict[str, Any]]:
        """Returns a list of objects among the components, empty if absent."""
        found = self.section("components").get(name, [])
        if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
            raise CheckpointError(f"{FACTS_FILE}: components.{name} must be a list of objects")
        return found

    def cases(self) -> dict[str, dict[str, Any]]:
        """Returns the end-to-end cases by name."""
        cases = self.section("cases")
        for name, case in cases.items():
            if not isinstance(case, dict) or not isinstance(case.get("args"), dict):
                raise CheckpointError(f"{FACTS_FILE}: {name} has no arguments")
        return cases

    def mark(self, key: str) -> None:
        """Count a tensor as read."""
        self._used.add(key)

    def lacking(self) -> list[str]:
        """Returns tensors that the facts list and the file does not hold, or holds in another shape.

        Cases and padding variants are left out: a folder need not hold all of them.
        """
        return [
            key
            for key, stated in self.section("tensors").items()
            if not (key.startswith("gen/") or "_pad_" in key)
            and (key not in self._tensors or list(self._tensors[key].shape) != _stated_shape(stated))
        ]

    def unused(self) -> Iterator[tuple[str, list[str]]]:
        """Yields each group that has tensors which were never read, with their names."""
        groups: dict[str, list[str]] = {}
        for key in sorted(self._tensors.keys() - self._used):
            groups.setdefault(key.split("/")[0], []).append(key)
        yield from groups.items()

    def section(self, name: str) -> dict[str, Any]:
        """Returns an object of the facts, empty if absent."""
        found = self.facts.get(name, {})
        if not isinstance(found, dict):
            raise CheckpointError(f"{FACTS_FILE}: {name} must be an object")
        return found


def _stated_shape(stated: Any) -> list[int]:
    """Returns the shape that the facts state of a tensor: {"shape": ...}, or a dtype and a shape."""
    return list(stated["shape"] if isinstance(stated, dict) else stated[1])


def as_bool(mask: Tensor) -> Tensor:
    """Returns a stored mask (uint8, int64 or float) as bool."""
    return mask.to(torch.bool)
