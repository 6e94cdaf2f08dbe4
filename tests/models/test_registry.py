"""What the registry knows of a model before its weights are loaded: names, aliases, limits and default values."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants

from stable_audio_serve.core.catalog import OPEN_FAMILY, V_SAMPLERS, ModelCatalog
from stable_audio_serve.core.errors import CheckpointError, ConfigError
from stable_audio_serve.models.registry import BUILT_IN, describe_entry, resolve_entry
from tests.goldens import OPEN_GOLDENS, load_goldens
from tests.models.hub import fill_cache

OFFICIAL = ("small-sfx", "small-music", "medium", "small-sfx-base", "small-music-base", "medium-base")


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_models_answer_to_all_their_names(name: str) -> None:
    catalog = ModelCatalog(BUILT_IN[other].card for other in OFFICIAL)
    for alias in (name, f"stable-audio-3-{name}", f" Stabilityai/Stable-Audio-3-{name} ".upper()):
        card = catalog.resolve(alias)
        assert card.name == name
        assert card.max_duration_s == (380.0 if name.startswith("medium") else 120.0)
        defaults = (card.default_steps, card.default_cfg_scale, card.default_duration_padding_s)
        assert defaults == ((50, 7.0, 6.0) if name.endswith("-base") else (8, 1.0, 6.0))
        assert card.objective == ("rectified_flow" if name.endswith("-base") else "rf_denoiser")
        assert card.latent_channels == 256


def test_an_entry_is_completed_from_its_folders_config() -> None:
    distilled = describe_entry(
        resolve_entry("mine", path=str(load_goldens("sharp-s").folder), aliases=("my-model",))
    ).card
    assert (distilled.sample_rate_hz, distilled.channels, distilled.max_duration_s) == (1000, 2, 16.384)
    assert (distilled.default_steps, distilled.default_cfg_scale) == (8, 1.0)
    assert distilled.aliases == ("my-model",)
    base = describe_entry(resolve_entry("other", path=str(load_goldens("sharp-l").folder))).card
    assert (base.default_steps, base.default_cfg_scale) == (50, 7.0)
    assert (base.objective, distilled.objective) == ("rectified_flow", "rf_denoiser")
    assert describe_entry(resolve_entry("demo")).card.latent_channels == 64


def test_a_local_copy_of_a_built_in_model_keeps_its_facts() -> None:
    entry = describe_entry(resolve_entry("medium", path=str(load_goldens("sharp-s").folder)))
    assert entry.repo_id is None
    assert "stable-audio-3-medium" in entry.card.aliases
    assert entry.card.max_duration_s == 16.384  # the limit of the folder's checkpoint, which is not the built-in model


@pytest.mark.parametrize(
    ("folder", "own"),
    [
        (load_goldens("sharp-s").folder, "even"),
        (load_goldens("sharp-l").folder, "even"),
        (OPEN_GOLDENS / "tiny-small", "reference"),
    ],
)
def test_each_family_has_a_default_edit_schedule(folder: Path, own: str) -> None:
    assert describe_entry(resolve_entry("mine", path=str(folder))).card.default_edit_schedule == own
    chosen = describe_entry(resolve_entry("mine", path=str(folder), edit_schedule="scaled")).card
    assert chosen.default_edit_schedule == "scaled"


def test_an_operator_may_pin_a_revision_and_limit_the_duration() -> None:
    entry = resolve_entry("small-sfx", revision="abc", max_duration_s=30.0, duration_padding_s=0.0)
    assert (entry.revision, entry.card.max_duration_s, entry.card.default_duration_padding_s) == ("abc", 30.0, 0.0)
    fork = resolve_entry("small-sfx", repo_id="someone/fork")
    assert (fork.repo_id, fork.card.max_duration_s) == ("someone/fork", 120.0)


def test_unknown_names_without_a_source_are_refused() -> None:
    with pytest.raises(ConfigError, match="small-sfx"):
        resolve_entry("large")


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model_config\.json"):
        describe_entry(resolve_entry("mine", path=str(tmp_path)))


@pytest.fixture(scope="module")
def filled_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a cache of huggingface_hub that has the repository lab/open. The hub itself does not run any more."""
    home = tmp_path_factory.mktemp("home")
    fill_cache(home, "lab/open", OPEN_GOLDENS / "tiny-1.0")
    return home / "hub"


@pytest.fixture
def cache(filled_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(filled_cache))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    return filled_cache


@pytest.mark.usefixtures("cache")
def test_an_entry_is_completed_from_the_cached_config() -> None:
    entry = describe_entry(resolve_entry("mine", repo_id="lab/open", aliases=("my-loops",)))
    local = describe_entry(resolve_entry("mine", path=str(OPEN_GOLDENS / "tiny-1.0"), aliases=("my-loops",)))
    # The entry has no folder, because the process that loads the model downloads the files.
    assert (entry.folder, entry.repo_id) == (None, "lab/open")
    assert entry.card == local.card
    assert (entry.card.family, entry.card.samplers) == (OPEN_FAMILY, V_SAMPLERS)
    assert (entry.card.default_steps, entry.card.default_cfg_scale) == (100, 7.0)
    capped = describe_entry(resolve_entry("mine", repo_id="lab/open", max_duration_s=0.5)).card
    assert capped.max_duration_s == 0.5 < entry.card.max_duration_s


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(
    "place", [{"repo_id": "lab/other"}, {"repo_id": "lab/open", "revision": "v2"}, {"repo_id": "a/b/c"}]
)
def test_an_entry_without_a_cached_config_is_unchanged(place: dict[str, str]) -> None:
    entry = resolve_entry("mine", **place)
    assert describe_entry(entry) == entry


def test_the_demo_is_marked_and_packaged() -> None:
    demo = BUILT_IN["demo"]
    assert demo.card.is_demo
    assert Path(demo.folder or "").parts[-3:] == ("stable_audio_serve", "demo", "checkpoint")


@pytest.mark.server
def test_the_registry_is_cheap_to_import() -> None:
    code = (
        "import sys; from stable_audio_serve.models.registry import resolve_entry; resolve_entry('medium'); "
        "sys.exit(bool({'torch', 'transformers', 'huggingface_hub', 'numpy'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
