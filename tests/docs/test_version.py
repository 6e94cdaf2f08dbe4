"""The changelog, the names of the container images, and the docs' example of a recipe have the package's version."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from stable_audio_serve import __version__

ROOT = Path(__file__).parents[2]


def test_changelog_starts_with_this_version() -> None:
    (first, *_) = re.findall(r"^## \[(.+)\]", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert first == __version__


def test_recipe_example_has_this_version() -> None:
    assert f'"version": "{__version__}"' in (ROOT / "docs" / "api.md").read_text()


@pytest.mark.parametrize(
    "name",
    [
        "Dockerfile",
        "compose.yaml",
        "compose.gpu.yaml",
        *(f"kuberay/overlays/{overlay}/kustomization.yaml" for overlay in ("demo", "one-gpu", "multi-gpu")),
    ],
)
def test_images_have_this_version(name: str) -> None:
    text = (ROOT / "cluster" / name).read_text()
    tags = re.findall(r"(?:stable-audio-serve:|newTag: )([\w.]+)-(?:cpu|cuda)\b", text)
    assert set(tags) == {__version__}
