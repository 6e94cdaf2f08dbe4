"""The `Check` type, and the runner that goes through a table of checks. Independent of model families."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from stable_audio_serve.verification.goldens import Goldens
from stable_audio_serve.verification.report import Report


class Subject(NamedTuple):
    """The input of a check: the stored numbers, and the model to compare with them or None."""

    goldens: Goldens
    model: Any = None


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
    """One row of the table: which stored numbers to compare, and how to compute them.

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


def run_checks(report: Report, subject: Subject, *, checks: Sequence[Check]) -> None:
    """Run every check and compare its findings. An error counts as a miss of its component; the other checks run."""
    for check in checks:
        skipped: Counter[str] = Counter()
        with report.guard(check.component), torch.no_grad():
            for match in _items(check, subject):
                with report.guard(check.component, match[0]):
                    for found in _findings(check, subject, match=match):
                        if isinstance(found, str):
                            skipped[found] += 1
                            continue
                        key, actual, expected, only, component = found
                        report.compare(component or check.component, key, actual=actual, expected=expected, only=only)
        for reason, count in skipped.items():
            report.skip(check.component, f"{count} {reason}" if count > 1 else reason)


def _items(check: Check, subject: Subject) -> list[re.Match[str]]:
    if not isinstance(subject.model, check.family):
        return []
    if check.over == "tensors":
        return subject.goldens.matching(check.pattern)
    names = subject.goldens.section("cases") if check.over == "cases" else [check.pattern]
    return [match for name in names if (match := re.fullmatch(check.pattern, name))]


def _findings(check: Check, subject: Subject, *, match: re.Match[str]) -> Iterable[Finding | str]:
    made = check.make(subject, match)
    return [Finding(match[0], made, subject.goldens[match[0]])] if isinstance(made, Tensor) else made


def same(key: str, stated: object, *, found: object, component: str | None = None) -> Finding:
    """Returns a finding that misses unless `found` equals the `stated` value."""
    return Finding(key, torch.tensor(found == stated), torch.tensor(True), component=component)
