"""Published figures are those of the committed results."""

from __future__ import annotations

import pytest

from benchmarks import page, scaling


@pytest.mark.slow
def test_pages_say_what_the_committed_results_say() -> None:
    for module in (page, scaling):
        assert module.PAGE.read_text() == module.render(), "run `make docs`"
