"""The tested versions of all packages run on the oldest Python that this package allows."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path
from typing import Any

from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[2]


def test_the_oldest_python_can_install_each_tested_version() -> None:
    oldest = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"].removeprefix(">=")
    pinned = re.findall(r"^([\w.-]+)(?:\[.+\])?==", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
    required = {name: python for name in pinned if (python := _required_python(name))}
    assert len(required) > 100
    assert {name: python for name, python in required.items() if f"{oldest}.0" not in SpecifierSet(python)} == {}


def _required_python(name: str) -> Any:
    """Returns the Python versions that an installed package allows, None if it names none or is not installed."""
    try:
        return metadata(name).json.get("requires_python")
    except PackageNotFoundError:  # optional packages
        return None
