"""If a program that a test needs is missing, the test fails and is not skipped."""

from __future__ import annotations

import pytest

from tests.cluster import tools

pytestmark = pytest.mark.cluster


def test_missing_program_fails_with_install_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools, "_find", lambda name: None)
    with pytest.raises(pytest.fail.Exception, match=r"kubectl is missing: apt-get install kubernetes-client"):
        tools.run_program("kubectl", "version")


@pytest.mark.parametrize("name", sorted(tools._INSTALLED_BY))
def test_every_program_is_installed(name: str) -> None:
    assert tools.find_program(name)
