from __future__ import annotations

import pytest

from stable_audio_serve.core.catalog import ModelCard, ModelCatalog
from stable_audio_serve.core.errors import ConfigError, UnknownModelError

A = ModelCard("a", "family", aliases=("Org/A", "first"))
B = ModelCard("b", "family")


@pytest.mark.parametrize("name", ["a", " A ", "org/a", "FIRST"])
def test_names_and_aliases_ignore_case_and_spaces(name: str) -> None:
    assert ModelCatalog([A, B]).resolve(name) is A


def test_the_first_model_is_the_default_unless_another_is_named() -> None:
    assert ModelCatalog([A, B]).default is A
    assert ModelCatalog([A, B], default="B").default is B


def test_the_demo_is_the_default_only_without_other_models() -> None:
    demo = ModelCard("demo", "family", is_demo=True)
    assert ModelCatalog([demo, A, B]).default is A
    assert ModelCatalog([demo]).default is demo
    assert ModelCatalog([demo, A], default="demo").default is demo


def test_an_unknown_name_lists_the_valid_ones() -> None:
    with pytest.raises(UnknownModelError, match="a, b") as caught:
        ModelCatalog([A, B]).resolve("c" * 1000)
    assert caught.value.field == "model"
    assert len(caught.value.message) < 300


def test_an_unservable_model_stops_startup() -> None:
    with pytest.raises(ConfigError, match="STABLE_AUDIO_DEFAULT_MODEL"):
        ModelCatalog([A, B], default="c")
    with pytest.raises(ConfigError, match="two models have the name"):
        ModelCatalog([A, ModelCard("first", "family")])
    with pytest.raises(ConfigError, match="two models have the name"):
        ModelCatalog([A, ModelCard(A.name, "family")])
    with pytest.raises(ConfigError, match="at least one"):
        ModelCatalog([])


def test_adapters_follow_the_name_of_a_model() -> None:
    catalog = ModelCatalog([A, B, ModelCard("c", "family", aliases=("b:x", "lab:c"))])
    for name, model, loras in (
        ("a:vinyl", "a", ("vinyl",)),
        ("ORG/A:Vinyl + bells", "a", ("Vinyl", "bells")),
        ("b:x", "c", ()),
        ("lab:c:vinyl", "c", ("vinyl",)),
        ("b:y", "b", ("y",)),
    ):
        card = catalog.resolve(name)
        assert (card.name, card.loras) == (model, loras)
    for name in ("a:", ":vinyl", "a:vinyl+", "a:+", "d:vinyl", "a:b:c", "::"):
        with pytest.raises(UnknownModelError, match="a, b, c"):
            catalog.resolve(name)


def test_settings_name_models_without_adapters() -> None:
    with pytest.raises(UnknownModelError):
        ModelCatalog([A, B]).find("a:vinyl")
    with pytest.raises(ConfigError, match="default_model"):
        ModelCatalog([A, B], default="a:vinyl")
