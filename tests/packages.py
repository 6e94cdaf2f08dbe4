"""Install packages that only one test needs. They are installed once, in the user's cache, outside the environment."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.patience import PATIENCE_S

_INSTALL_S = 3 * PATIENCE_S


def install_npm(package: str) -> Path:
    """Return the folder `node_modules` with an npm package, such as `@fal-ai/client@1.10.1`."""
    if not shutil.which("node") or not shutil.which("npm"):
        skip_or_fail(package, "node and npm are not installed")
    command = ("npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", package, "--prefix")
    return _install(package, *command) / "node_modules"


def install_python(requirement: str) -> Path:
    """Return a folder with a Python package, such as `av==18.1.0`, and its dependencies. Add it to PYTHONPATH."""
    options = ("--quiet", "--disable-pip-version-check", "--no-compile")
    return _install(requirement, sys.executable, "-m", "pip", "install", *options, requirement, "--target")


def skip_or_fail(name: str, reason: str) -> None:
    """Skip the test. In CI, where every test must run, fail instead."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{name}: {reason}")
    pytest.skip(f"NOT TESTED, {name}: {reason}")


def _install(name: str, *command: str) -> Path:
    """Return the folder of a package. If the folder is missing, install with `command` and a folder as argument.

    Each Python version has its own folder, because packages may have compiled parts.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stable-audio-serve-tests"
    installed = cache / f"{name.replace('/', '-')}-{sys.implementation.cache_tag}"
    if not installed.exists():
        cache.mkdir(parents=True, exist_ok=True)
        folder = tempfile.mkdtemp(dir=cache)
        done = subprocess.run([*command, folder], capture_output=True, text=True, timeout=_INSTALL_S, check=False)
        if done.returncode:
            shutil.rmtree(folder)
            skip_or_fail(name, f"the package could not be installed: {done.stderr[-500:]}")
        try:
            Path(folder).rename(installed)  # atomically
        except OSError:  # another test process was faster
            shutil.rmtree(folder)
    return installed
