"""The rows of the tables of checks, and what a check receives and returns. Independent of model families."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import UnionType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from stable_audio_serve.core.generation import GenerationRequest, SourceAudio
from stable_audio_serve.verification.goldens import Goldens


class Subject(NamedTuple):
    """The input of a check: the stored numbers, and the model to compare with them or None."""

    goldens: Goldens
    model: Any = None

    def request(self, audio: Tensor) -> GenerationRequest:
        """Returns a request whose source is `audio` (C, S) at the model's rate. The result is as long as the source."""
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
    """One row of a table: which stored numbers to compare, and how to compute them.

    `component` selects the error bound. `over` selects the items: stored tensors or cases whose whole name matches the
    regular expression `pattern`, or one call. `make` is called for each item. It returns the computed tensor, or any
    number of findings. A text among the findings is the reason why a comparison is skipped. The check runs only if the
    model is of the class `family`; the default includes folders without a model.
    """

    component: str
    pattern: str
    make: Callable[[Subject, re.Match[str]], Tensor | Iterable[Finding | str]]
    over: Literal["tensors", "cases", "once"] = "tensors"
    family: type | UnionType = object

    def items(self, goldens: Goldens) -> list[re.Match[str]]:
        """Returns a match of the pattern for each item."""
        if self.over == "tensors":
            return goldens.matching(self.pattern)
        names = goldens.section("cases") if self.over == "cases" else [self.pattern]
        return [match for name in names if (match := re.fullmatch(self.pattern, name))]

    def findings(self, it: Subject, match: re.Match[str]) -> Iterable[Finding | str]:
        """Returns the findings for one item. A computed tensor must match the stored tensor of the item's name."""
        made = self.make(it, match)
        return [Finding(match[0], made, it.goldens[match[0]])] if isinstance(made, Tensor) else made


def same(key: str, stated: object, *, found: object, component: str | None = None) -> Finding:
    """Returns a finding that misses unless `found` equals the `stated` value."""
    return Finding(key, torch.tensor(found == stated), torch.tensor(True), component=component)


@contextmanager
def calls_of(module: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Yields a list that receives the first input and the output of each call of `module` inside the block."""
    calls: list[tuple[Tensor, Tensor]] = []
    with module.register_forward_hook(lambda _, given, made: calls.append((given[0].clone(), made.clone()))):
        yield calls
