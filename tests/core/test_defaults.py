"""Which model is the default."""

from __future__ import annotations

from pathlib import Path

import pytest

from stable_audio_serve.core.catalog import ModelCard, ModelCatalog
from stable_audio_serve.core.settings_sources import load_settings

DEMO, SFX, MUSIC = (ModelCard(name, "f", is_demo=name == "demo") for name in ("demo", "small-sfx", "small-music"))


@pytest.mark.parametrize(
    ("cards", "environ", "expected"),
    [
        ([DEMO], {}, DEMO),
        ([SFX, MUSIC], {}, SFX),
        ([DEMO, SFX, MUSIC], {}, SFX),
        ([SFX, MUSIC], {"STABLE_AUDIO_MODEL": "small-music"}, MUSIC),
        ([SFX, MUSIC], {"STABLE_AUDIO_MODEL": "small-sfx", "STABLE_AUDIO_DEFAULT_MODEL": "small-music"}, MUSIC),
    ],
)
def test_a_variable_or_the_first_model_that_is_no_demo_decides(
    tmp_path: Path, cards: list[ModelCard], environ: dict[str, str], expected: ModelCard
) -> None:
    settings = load_settings(environ=environ, directory=tmp_path)
    assert ModelCatalog(cards, default=settings.default_model).default is expected


def test_the_settings_file_may_set_the_default(tmp_path: Path) -> None:
    settings = load_settings({"default_model": "small-music"}, environ={}, directory=tmp_path)
    assert ModelCatalog([SFX, MUSIC], default=settings.default_model).default is MUSIC
