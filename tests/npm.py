"""Packages of the npm registry that tests use."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests.patience import PATIENCE_S


def install(package: str) -> Path:
    """Return the folder `node_modules` in the user's cache with a package such as "axe-core@4.14.1".

    The first call installs the package. Without npm the test is skipped; in CI, where every test must run, it fails.
    """
    if not shutil.which("node") or not shutil.which("npm"):
        _skip_or_fail(package, "node and npm are not installed")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stable-audio-serve-tests"
    installed = cache / package.replace("/", "-")
    if not installed.exists():
        cache.mkdir(parents=True, exist_ok=True)
        folder = tempfile.mkdtemp(dir=cache)
        command = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix", folder, package]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
        if done.returncode:
            shutil.rmtree(folder)
            _skip_or_fail(package, f"npm could not install it: {done.stderr[-500:]}")
        Path(folder).rename(installed)  # atomically
    return installed / "node_modules"


def _skip_or_fail(package: str, reason: str) -> None:
    if os.environ.get("CI") == "true":
        pytest.fail(f"{package}: {reason}")
    pytest.skip(f"NOT TESTED, {package}: {reason}")
