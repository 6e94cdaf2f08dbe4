"""The page of results says what the committed files say."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from benchmarks.cli import parser, refuse
from benchmarks.page import PAGE, RESULTS, render

pytestmark = pytest.mark.slow


def test_the_page_is_current() -> None:
    assert PAGE.read_text() == render(), "run `make docs`"


def test_other_results_make_another_page(tmp_path: Path) -> None:
    shutil.copytree(RESULTS / "cpu-2-cores", tmp_path / "cpu-2-cores")
    path = tmp_path / "cpu-2-cores" / "cold-start.json"
    report = json.loads(path.read_text())
    report["results"]["first_audio_over_ray_plus_bare_ratio"] = 7.5
    path.write_text(json.dumps(report))
    assert "| P14 | cold start | 7.50 |" in render(tmp_path)
    assert "Not measured yet: `make bench-gpu`" in render(tmp_path)


def test_every_table_says_the_command_that_measures_it_again() -> None:
    commands = re.findall(r"^### .+\n\n`python -m benchmarks (.+)`$", render(), flags=re.MULTILINE)
    assert len(commands) == render().count("\n### ") - render().count("\n### Goals")
    for command in commands:
        given = vars(parser().parse_args(command.split()))
        case = given.pop("case")
        assert [refusal for name in given if (refusal := refuse(case, name, given=given))] == []
    assert any(command.startswith("run --mix demo-wide --against lock,static,ours") for command in commands)
