"""The reference numbers of a folder, and the checks that compare them with a model. Independent of model families."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from stable_audio_serve.core.errors import CheckpointError
from stable_audio_serve.core.generation import GenerationRequest, SourceAudio
from stable_audio_serve.models.sa3.denoiser import Update

FACTS_FILE = "golden.json"
TENSORS_FILE = "golden.safetensors"
ADAPTERS = "lora"  # folder of adapter files and their own reference numbers
_WHERE = "Reference numbers are in tests/data/goldens of a source checkout; the installed package has none."


class Goldens:
    """The reference numbers of one folder: facts, and tensors by `<group>/<name>`. Records which tensors were read.

    Raises CheckpointError if a file, key or value is missing or malformed.
    """

    def __init__(self, facts: dict[str, Any], tensors: dict[str, Tensor], *, folder: Path = Path()) -> None:
        self.facts = facts
        self.folder = folder
        self._tensors = tensors
        self._used: set[str] = set()

    @classmethod
    def load(cls, folder: Path) -> Goldens:
        """Read all files of a folder. The error message names the file that cannot be used.

        The facts and tensors of adapters are in the group `lora`.
        """
        path = folder / FACTS_FILE
        try:
            facts = dict(json.loads(path.read_text(encoding="utf-8")))
            path = folder / TENSORS_FILE
            tensors = load_file(path)
            if (path := folder / ADAPTERS / f"lora_{FACTS_FILE}").exists():
                facts[ADAPTERS] = dict(json.loads(path.read_text(encoding="utf-8")))
                path = path.with_name(f"lora_{TENSORS_FILE}")
                tensors |= {f"{ADAPTERS}/{key}": tensor for key, tensor in load_file(path).items()}
            return cls(facts, tensors, folder=folder)
        except FileNotFoundError as error:
            raise CheckpointError(f"{path}: file not found. {_WHERE}") from error
        except (OSError, ValueError, TypeError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error

    def __getitem__(self, key: str) -> Tensor:
        """Returns the tensor `key`. Floating-point tensors are converted to float32."""
        if key not in self._tensors:
            raise CheckpointError(f"{TENSORS_FILE} has no {key}")
        self._used.add(key)
        tensor = self._tensors[key]
        return tensor.float() if tensor.is_floating_point() else tensor

    def find(self, key: str) -> Tensor | None:
        return self[key] if key in self._tensors else None

    def matching(self, pattern: str) -> list[re.Match[str]]:
        """Returns a match for each key that the regular expression `pattern` matches in full, sorted by key.

        Marks the tensors of these keys as read.
        """
        matches = [match for key in sorted(self._tensors) if (match := re.fullmatch(pattern, key))]
        self._used |= {match[0] for match in matches}
        return matches

    def section(self, *path: str) -> dict[str, Any]:
        """Returns the JSON object at `path` in the facts, or an empty dict if there is none.

        Raises CheckpointError if the value at `path` is not an object.
        """
        found = self.facts
        for part in path:
            found = found.get(part, {})
            if not isinstance(found, dict):
                raise CheckpointError(f"{FACTS_FILE}: {'.'.join(path)} must be an object")
        return found

    def unused(self) -> list[str]:
        """Returns the keys of the tensors that were never read, sorted."""
        return sorted(self._tensors.keys() - self._used)


class Subject(NamedTuple):
    """The input of a check: the stored numbers, and the model. In folders without a model, `model` is None."""

    goldens: Goldens
    model: Any = None

    def request(self, audio: Tensor) -> GenerationRequest:
        """Returns a request with the source `audio` (C, S), at the model's rate, for a clip as long as `audio`."""
        source = SourceAudio(audio.numpy(), self.model.spec.card.sample_rate_hz)
        duration_s = audio.shape[-1] / source.sample_rate_hz
        return GenerationRequest(prompt="", duration_s=duration_s, seed=0, init_audio=source)


class Finding(NamedTuple):
    """A computed value and the stored value that it must match.

    `only` (broadcastable bool) marks the elements to compare. `component` overrides the component of the check.
    """

    key: str
    actual: Tensor
    expected: Tensor
    only: Tensor | None = None
    component: str | None = None


@dataclass(frozen=True, slots=True)
class Check:
    """A check: which stored numbers to compare, and how to compute the values that they must match.

    `make` is called for each stored tensor or each case (`over`) whose whole name matches the regular expression
    `pattern`. If `over` is "once", `make` is called once. `make` returns the computed tensor, or any number of
    findings. A string among the findings is the reason why a comparison is skipped. `component` selects the error
    bound. The check runs only if the model is of the class `family`; the default includes folders without a model.
    """

    component: str
    pattern: str
    make: Callable[[Subject, re.Match[str]], Tensor | Iterable[Finding | str]]
    over: Literal["tensors", "cases", "once"] = "tensors"
    family: type | UnionType = object

    def items(self, goldens: Goldens) -> list[re.Match[str]]:
        """Returns a match of the pattern for each call of `make`."""
        if self.over == "tensors":
            return goldens.matching(self.pattern)
        names = goldens.section("cases") if self.over == "cases" else [self.pattern]
        return [match for name in names if (match := re.fullmatch(self.pattern, name))]


def same(key: str, stated: object, *, found: object, component: str | None = None) -> Finding:
    """Returns a finding that fails if `found` differs from the `stated` value."""
    return Finding(key, torch.tensor(found == stated), torch.tensor(True), component=component)


@contextmanager
def calls_of(module: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Yields a list that receives the first input and the output of each call of `module` inside the block.

    A layer that leaves an update of its tokens to the layer after it must run in a batch with padding.
    """

    def copy(made: Tensor | tuple[Tensor, Update]) -> Tensor:
        if isinstance(made, tuple):
            tokens, update = made
            return update.added_to(tokens)
        return made.clone()

    calls: list[tuple[Tensor, Tensor]] = []
    with module.register_forward_hook(lambda _, given, made: calls.append((given[0].clone(), copy(made)))):
        yield calls
