"""The figures in the docs match the benchmark results in the repository."""

from __future__ import annotations

import pytest

from benchmarks import page


@pytest.mark.slow
def test_pages_have_the_committed_results() -> None:
    assert page.PAGE.read_text() == page.render(), "run `make docs`"
    assert page.SUMMARY.read_text() == page.fill(page.SUMMARY.read_text()), "run `make docs`"
