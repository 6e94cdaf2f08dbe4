"""Which model is the default, and the log line that says why."""

from __future__ import annotations

from pathlib import Path

import pytest

from stable_audio_serve.core.catalog import ModelCard, ModelCatalog
from stable_audio_serve.core.settings_sources import explain_default, load_settings

DEMO, SFX, MUSIC = (ModelCard(name, "f", is_demo=name == "demo") for name in ("demo", "small-sfx", "small-music"))


@pytest.mark.parametrize(
    ("cards", "environ", "expected"),
    [
        ([DEMO], {}, "demo: the only model"),
        ([SFX, MUSIC], {}, "small-sfx: the first of models"),
        ([DEMO, SFX, MUSIC], {}, "small-sfx: the first of models that is no demo"),
        ([SFX, MUSIC], {"STABLE_AUDIO_MODEL": "small-music"}, "small-music: named by STABLE_AUDIO_MODEL"),
        (
            [SFX, MUSIC],
            {"STABLE_AUDIO_MODEL": "small-sfx", "STABLE_AUDIO_DEFAULT_MODEL": "small-music"},
            "small-music: named by STABLE_AUDIO_DEFAULT_MODEL",
        ),
    ],
)
def test_the_log_names_why_a_model_is_the_default(
    tmp_path: Path, cards: list[ModelCard], environ: dict[str, str], expected: str
) -> None:
    settings = load_settings(environ=environ, directory=tmp_path)
    catalog = ModelCatalog(cards, default=settings.default_model)
    assert f"{catalog.default.name}: {explain_default(settings, catalog, environ=environ)}" == expected


def test_the_settings_file_may_set_the_default(tmp_path: Path) -> None:
    settings = load_settings({"default_model": "small-music"}, environ={}, directory=tmp_path)
    catalog = ModelCatalog([SFX, MUSIC], default=settings.default_model)
    assert explain_default(settings, catalog, environ={}) == "named by default_model"
