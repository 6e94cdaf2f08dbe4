"""The test command finds every test: those with a Ray cluster or that run alone lie where it looks for them."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
MARKS = re.compile(r"pytest\.mark\.(ray|serial)\b")


def read_places() -> list[Path]:
    (line,) = re.findall(r"(?m)^ALONE := (.*)$", (ROOT / "Makefile").read_text())
    return [ROOT / place for place in line.split()]


def test_what_needs_a_cluster_or_runs_alone_is_where_the_command_looks() -> None:
    places = read_places()
    marked = [path for path in (ROOT / "tests").rglob("test_*.py") if MARKS.search(path.read_text())]
    assert len(marked) >= 7
    assert not [path for path in marked if not any(path.is_relative_to(place) for place in places)]


def test_the_first_command_leaves_out_only_what_runs_alone() -> None:
    left_out = re.findall(r"--ignore=(\S+)", (ROOT / "Makefile").read_text())
    assert left_out
    for name in left_out:
        text = (ROOT / name).read_text()
        assert re.search(r"(?m)^pytestmark = .*pytest\.mark\.serial\b", text), f"{name} has tests that would not run"
