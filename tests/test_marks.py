"""`make test` runs every test once: of its commands one is for every kind of test, and looks where such tests are."""

from __future__ import annotations

import re
import tomllib
from itertools import product
from pathlib import Path

ROOT = Path(__file__).parent.parent
MAKEFILE = (ROOT / "Makefile").read_text()
MARKS = [
    line.split(":")[0]
    for line in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["markers"]
]
ELSEWHERE = {"gpu", "chaos", "cluster"}  # what `make test-gpu`, `make chaos` and `make check-cluster` run
PLACES = {"ray": "RAY", "serial": "ALONE"}


def read_commands() -> list[str]:
    """Lines of `make test`."""
    (recipe,) = re.findall(r"(?m)^test: .*\n((?:\t.*\n)+)", MAKEFILE)
    return recipe.splitlines()


def read_places(name: str) -> list[Path]:
    (line,) = re.findall(rf"(?m)^{name} := (.*)$", MAKEFILE)
    return [ROOT / place for place in line.split()]


def test_whatever_marks_a_test_has_one_command_runs_it() -> None:
    chosen = [re.findall(r' -m "(.*)"$', line) for line in read_commands()]
    assert all(len(expressions) == 1 for expressions in chosen)
    for values in product((False, True), repeat=len(MARKS)):
        marks = dict(zip(MARKS, values, strict=True))
        number = sum(eval(expression, {}, marks) for (expression,) in chosen)
        assert number == (not any(marks[name] for name in ELSEWHERE)), marks


def test_what_needs_a_cluster_or_runs_alone_is_where_its_command_looks() -> None:
    for mark, variable in PLACES.items():
        (command,) = (line for line in read_commands() if f'-m "{mark} ' in line)
        assert f"$({variable})" in command
        marked = [
            p for p in (ROOT / "tests").rglob("test_*.py") if re.search(rf"pytest\.mark\.{mark}\b", p.read_text())
        ]
        assert len(marked) >= 2
        assert not [path for path in marked if not any(map(path.is_relative_to, read_places(variable)))]


def test_the_first_command_leaves_out_only_what_runs_alone() -> None:
    left_out = re.findall(r"--ignore=(\S+)", MAKEFILE)
    assert left_out
    for name in left_out:
        text = (ROOT / name).read_text()
        assert re.search(r"(?m)^pytestmark = .*pytest\.mark\.serial\b", text), f"{name} has tests that would not run"
