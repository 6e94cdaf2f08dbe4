"""The definition of a check, and the loop that runs a table of checks. Knows no family and no meaning of a number."""

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
    """What checks read: the stored numbers and, unless these need none, the model, of the family of the table."""

    goldens: Goldens
    model: Any = None


class Found(NamedTuple):
    """A value that was made here and the stored one.

    `only` (broadcastable bool) are the elements that count, `component` is another one than the check's.
    """

    key: str
    actual: Tensor
    expected: Tensor
    only: Tensor | None = None
    component: str | None = None


@dataclass(frozen=True, slots=True)
class Check:
    """One row of a table: the component whose bound in `BOUNDS` applies, the stored numbers, and how to compute them.

    `make` is called for every stored tensor, or for every case of the facts, whose whole name is `pattern`, a regular
    expression; or once. It returns what the stored tensor should be, or any number of findings, among them texts that
    say why something is skipped.
    """

    component: str
    pattern: str
    make: Callable[[Subject, re.Match[str]], Tensor | Iterable[Found | str]]
    over: Literal["tensors", "cases", "once"] = "tensors"


def run_checks(report: Report, subject: Subject, *, checks: Sequence[Check]) -> None:
    """Run every check and compare its findings; an error is a miss of its component and does not stop the others."""
    for check in checks:
        skipped: Counter[str] = Counter()
        with report.guard(check.component), torch.no_grad():
            for match in _items(check, subject.goldens):
                with report.guard(check.component, match[0]):
                    skipped.update(_run_check(report, subject, check=check, match=match))
        for reason, count in skipped.items():
            report.skip(check.component, f"{count} {reason}" if count > 1 else reason)


def _run_check(report: Report, subject: Subject, *, check: Check, match: re.Match[str]) -> list[str]:
    """Compare the findings of a check for one item. Returns the reasons why something was skipped."""
    made, skipped = check.make(subject, match), []
    for found in [Found(match[0], made, subject.goldens[match[0]])] if isinstance(made, Tensor) else made:
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


def same(key: str, stated: object, *, found: object, component: str | None = None) -> Found:
    """Returns whether a value equals the stated one, as a finding that is compared with true."""
    return Found(key, torch.tensor(found == stated), torch.tensor(True), component=component)
