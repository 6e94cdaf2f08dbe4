"""docs/architecture.md names only files that exist, and CONTRIBUTING.md lists every folder of the package."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "stable_audio_serve"
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()
FOLDERS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))


def test_every_file_in_the_walkthroughs_exists() -> None:
    named = re.findall(r"`([a-z0-9_/]+(?:\.py|/))`", ARCHITECTURE.replace("`stable_audio_serve/`", ""))
    assert len(named) > 40
    assert [path for path in named if not (PACKAGE / path).exists()] == []


def test_each_walkthrough_has_ten_steps_with_a_file() -> None:
    walks = ARCHITECTURE.split("\n## From ")[1:]
    assert len(walks) == 2
    for walk in walks:
        stops = re.split(r"^\d+\. ", walk, flags=re.MULTILINE)[1:]
        assert len(stops) == 10
        assert all(stop.startswith("`") for stop in stops)


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_folder_is_in_the_table(folder: str) -> None:
    rows = [line for line in (ROOT / "CONTRIBUTING.md").read_text().splitlines() if line.startswith("| `")]
    assert any(f"`{folder}/`" in row.split("|")[1] for row in rows)


def test_jobs_package_has_at_most_eight_parts() -> None:
    parts = {
        path.name for path in (PACKAGE / "jobs").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert len(parts - {"__init__.py"}) <= 8
