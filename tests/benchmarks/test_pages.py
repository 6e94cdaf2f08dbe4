"""The figures in the docs match the benchmark results in the repository."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import page


@pytest.mark.slow
def test_pages_have_the_committed_results() -> None:
    for path in page.PAGES:
        assert path.read_text() == page.fill(path.read_text()), "run `make docs`"


def test_the_page_of_results_has_every_result() -> None:
    text = page.PAGES[0].read_text()
    for path in page.RESULTS.glob("cpu-*/*.json"):
        assert f"<!-- {path.parent.name}/{path.stem} -->" in text
    for folder in filter(Path.is_dir, page.RESULTS.iterdir()):
        assert f"<!-- {folder.name}/machine -->" in text
