"""The figures in the docs match the committed results."""

from __future__ import annotations

import pytest

from benchmarks import page


@pytest.mark.slow
def test_the_page_matches_the_committed_results() -> None:
    assert page.PAGE.read_text() == page.render(), "run `make docs`"
