"""The `Check` type and the loop that runs a table of checks. Independent of model families."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from stable_audio_serve.verification.goldens import Goldens
from stable_audio_serve.verification.report import Report


class Subject(NamedTuple):
    """The input of a check: the stored numbers and the model to compare with them.

    The model belongs to the family of the check's table. It is None if the numbers need no model.
    """

    goldens: Goldens
    model: Any = None


class Finding(NamedTuple):
    """A computed value and the stored value it must match.

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

    `component` selects the bound in `BOUNDS`. `over` selects the items: stored tensors or cases whose whole name
    matches the regular expression `pattern`, or a single call. `make` is called for each item. It returns the computed
    tensor, or any number of findings. A text among the findings is the reason why a comparison is skipped.
    """

    component: str
    pattern: str
    make: Callable[[Subject, re.Match[str]], Tensor | Iterable[Finding | str]]
    over: Literal["tensors", "cases", "once"] = "tensors"


def run_checks(report: Report, subject: Subject, *, checks: Sequence[Check]) -> None:
    """Run every check and compare its findings. An error counts as a miss of its component; the other checks run."""
    for check in checks:
        skipped: Counter[str] = Counter()
        with report.guard(check.component), torch.no_grad():
            for match in _items(check, subject.goldens):
                with report.guard(check.component, match[0]):
                    skipped.update(_run_check(report, subject, check=check, match=match))
        for reason, count in skipped.items():
            report.skip(check.component, f"{count} {reason}" if count > 1 else reason)


def _run_check(report: Report, subject: Subject, *, check: Check, match: re.Match[str]) -> list[str]:
    """Compare the findings of a check for one item. Returns the reasons for skipped comparisons."""
    made, skipped = check.make(subject, match), []
    for found in [Finding(match[0], made, subject.goldens[match[0]])] if isinstance(made, Tensor) else made:
        if isinstance(found, str):
            skipped.append(found)
        else:
            component = found.component or check.component
            report.compare(component, found.key, actual=found.actual, expected=found.expected, only=found.only)
    return skipped


def _items(check: Check, goldens: Goldens) -> list[re.Match[str]]:
    if check.over == "tensors":
        return goldens.matching(check.pattern)
    names = goldens.section("cases") if check.over == "cases" else [check.pattern]
    return [match for name in names if (match := re.fullmatch(check.pattern, name))]


def same(key: str, stated: object, *, found: object, component: str | None = None) -> Finding:
    """Returns a finding that misses unless `found` equals the `stated` value."""
    return Finding(key, torch.tensor(found == stated), torch.tensor(True), component=component)
