"""The adapters of a server: from settings, from folders that change, and from the database."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from stable_audio_serve.core.catalog import ModelCard
from stable_audio_serve.core.errors import ConflictError, InvalidRequestError, NotFoundError, StorageError
from stable_audio_serve.core.generation import Lora
from stable_audio_serve.core.settings import Settings
from stable_audio_serve.jobs.open import open_store
from stable_audio_serve.jobs.store.loaded_adapters import AdapterStore
from stable_audio_serve.models.adapters.sources import fetch_adapter
from stable_audio_serve.serving import adapters as module
from stable_audio_serve.serving.adapters import Library
from stable_audio_serve.serving.placement import plan_deployments
from tests.adapter_files import write_file
from tests.backends import make_catalog
from tests.patience import PATIENCE_S, until

CATALOG = make_catalog()
MEDIUM = CATALOG.find("medium")


def make_library(
    folder: Path, *, has_store: bool = False, database_url: str | None = None, fetch: Any = None, **model: Any
) -> Library:
    tree: dict[str, Any] = {"models": [{"name": "medium", **model}, {"name": "small-sfx"}]}
    tree |= {"output_dir": str(folder / "out"), "jobs": {"database_url": database_url}}
    settings = plan_deployments(Settings.model_validate(tree)).settings
    store = AdapterStore(open_store(settings).database, "audio") if has_store else None
    library = Library(settings, CATALOG, store=store, fetch=fetch)
    library.start()
    return library


def names(library: Library) -> list[str]:
    return [card.name for card in library.cards("medium") if card.problem is None]


def refusal(library: Library, *loras: Lora, model: ModelCard = MEDIUM) -> str:
    with pytest.raises(InvalidRequestError) as caught:
        library.resolve(model, loras)
    assert caught.value.field == "loras"
    return caught.value.message


def test_configured_adapters_are_resolved(tmp_path: Path) -> None:
    sha256 = write_file(tmp_path / "a.safetensors", kind="dora-rows", rank=3)
    path = str(tmp_path / "a.safetensors")
    library = make_library(tmp_path, loras={"vinyl": path, "my tape": {"path": path, "conditioner": True}})
    (tape, vinyl) = library.cards()
    assert (vinyl.name, vinyl.model, vinyl.type, vinyl.rank, vinyl.sha256) == (
        "vinyl",
        "medium",
        "dora-rows",
        3,
        sha256,
    )
    assert vinyl.num_bytes == (tmp_path / "a.safetensors").stat().st_size
    assert (vinyl.source, vinyl.public_source) == (path, "a.safetensors")
    assert library.resolve(MEDIUM, [Lora("vinyl", 0.5)]) == (Lora("vinyl", 0.5, source=path, sha256=sha256),)
    assert library.resolve(MEDIUM, [Lora("my tape")])[0].has_conditioners
    assert tape.has_conditioners
    assert library.resolve(MEDIUM, []) == ()


def test_relative_paths_of_settings_are_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_file(tmp_path / "folder" / "a.safetensors")
    library = make_library(tmp_path, loras={"one": "folder/a.safetensors"}, lora_folder="folder")
    assert {card.source for card in library.cards()} == {str(tmp_path / "folder" / "a.safetensors")}


def test_values_out_of_range_are_refused(tmp_path: Path) -> None:
    write_file(tmp_path / "f" / "plain.safetensors", rank=4)
    write_file(tmp_path / "f" / "dora.safetensors", kind="dora-rows", rank=4)
    library = make_library(tmp_path, lora_folder=str(tmp_path / "f"), max_loras=2, max_lora_rank=6)
    assert "allowed: -2 to 2" in refusal(library, Lora("plain", -2.1))
    assert "allowed: 0 to 2" in refusal(library, Lora("dora", -0.1))
    assert "allowed: 0 to 2" in refusal(library, Lora("dora", float("nan")))
    assert "0 <= low <= high <= 1" in refusal(library, Lora("plain", interval=(0.5, 0.4)))
    assert "0 <= low <= high <= 1" in refusal(library, Lora("plain", interval=(0.0, 1.1)))
    assert "at most 2" in refusal(library, *[Lora("plain")] * 3)
    assert "add up to 8" in refusal(library, Lora("plain"), Lora("dora"))
    assert library.resolve(MEDIUM, [Lora("plain"), Lora("dora", 0.0)])
    assert "another file" in refusal(library, Lora("plain", sha256="0" * 64))
    sha256 = library.cards()[1].sha256
    assert library.resolve(MEDIUM, [Lora("plain", sha256=sha256)])
    assert "conditioners" in refusal(library, Lora("plain", sha256=sha256, has_conditioners=True))
    assert "takes no adapters" in refusal(library, Lora("plain"), model=ModelCard("open", "stable-audio-open"))


def test_unknown_names_are_refused_with_near_ones(tmp_path: Path) -> None:
    for name in ("vinyl", "vinyl-old", "bells"):
        write_file(tmp_path / "f" / f"{name}.safetensors")
    library = make_library(tmp_path, lora_folder=str(tmp_path / "f"))
    assert "near names: vinyl" in refusal(library, Lora("vinil"))
    assert "vinyl" in refusal(library, Lora("VINYL"))
    assert "bells, vinyl, vinyl-old" in refusal(library, Lora("x"))
    assert len(refusal(library, Lora("x" * 10_000))) < 300
    assert "none" in refusal(library, Lora("vinyl"), model=CATALOG.find("small-sfx"))


@pytest.mark.parametrize("limit", [3, 4])
def test_files_above_the_rank_limit_are_refused(tmp_path: Path, limit: int) -> None:
    write_file(tmp_path / "f" / "large.safetensors", rank=4)
    library = make_library(tmp_path, lora_folder=str(tmp_path / "f"), max_lora_rank=limit)
    if limit == 4:
        assert names(library) == ["large"]
    else:
        assert "'large' has rank 4, allowed: 1 to 3" in refusal(library, Lora("large"))


async def test_folders_are_read_again_while_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_READ_EVERY_S", 0.01)
    folder = tmp_path / "f"
    library = make_library(tmp_path, lora_folder=str(folder))
    following = asyncio.create_task(library.follow())
    assert names(library) == []
    first = write_file(folder / "vinyl.safetensors")
    write_file(folder / "bells.safetensors")
    (folder / "notes.txt").write_text("x")
    await until(lambda: names(library) == ["bells", "vinyl"])
    second = write_file(folder / "vinyl.safetensors", seed=2)
    await until(lambda: library.resolve(MEDIUM, [Lora("vinyl")])[0].sha256 == second)
    assert first != second
    (folder / "vinyl.safetensors").unlink()
    await until(lambda: names(library) == ["bells"])
    following.cancel()


def test_a_copy_with_the_old_time_and_size_is_read(tmp_path: Path) -> None:
    path, new = tmp_path / "f" / "vinyl.safetensors", tmp_path / "vinyl.safetensors"
    write_file(path)
    library = make_library(tmp_path, lora_folder=str(tmp_path / "f"))
    second = write_file(new, seed=2)
    os.utime(new, ns=(0, path.stat().st_mtime_ns))
    time.sleep(0.02)  # the file system's clock has steps of up to 10 ms
    shutil.copy2(new, path)  # like `cp -p`: writes into the same inode, and then sets the time
    library.start()
    assert library.resolve(MEDIUM, [Lora("vinyl")])[0].sha256 == second


async def test_damaged_files_are_skipped_with_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    folder = tmp_path / "f"
    write_file(folder / "vinyl.safetensors")
    whole = (folder / "vinyl.safetensors").read_bytes()
    (folder / "torn.safetensors").write_bytes(whole[:-1])
    (folder / "a:b.safetensors").write_bytes(whole)
    library = make_library(tmp_path, lora_folder=str(folder), loras={"gone": str(tmp_path / "gone.safetensors")})
    for _ in range(3):
        await library.refresh()
    assert names(library) == ["vinyl"]
    assert "'torn' is corrupt or incomplete" in refusal(library, Lora("torn"))
    assert "no file gone.safetensors" in refusal(library, Lora("gone"))
    warnings = [record.getMessage() for record in caplog.records]
    assert [sum(name in warning for warning in warnings) for name in ("'torn'", "'gone'", "a:b")] == [1, 1, 1]
    (folder / "torn.safetensors").write_bytes(whole)
    await library.refresh()
    assert names(library) == ["torn", "vinyl"]


async def test_a_name_that_is_not_utf_8_is_not_served(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "f"
    write_file(folder / "vinyl.safetensors")
    (folder / "vinyl.safetensors").rename(folder / os.fsdecode(b"b\xfcro.safetensors"))
    library = make_library(tmp_path, lora_folder=str(folder))
    assert names(library) == []
    assert "not UTF-8" in caplog.text


async def test_a_source_that_breaks_does_not_end_the_updates(tmp_path: Path) -> None:
    write_file(tmp_path / "f" / "vinyl.safetensors")

    asked = threading.Event()

    def fetch(source: str) -> Path:
        if source == "lab/x":
            asked.set()
            raise RuntimeError("a bug")
        return tmp_path / "good.safetensors" if source == "lab/y" else Path(source)

    write_file(tmp_path / "good.safetensors")
    loras = {"x": "lab/x", "y": "lab/y"}
    library = make_library(tmp_path, fetch=fetch, lora_folder=str(tmp_path / "f"), loras=loras)
    following = asyncio.create_task(library.follow())
    await until(asked.is_set)
    await until(lambda: names(library) == ["vinyl", "y"])
    assert "a bug" in refusal(library, Lora("x"))
    assert not following.done()
    following.cancel()
    with pytest.raises(InvalidRequestError, match="cannot be downloaded"):
        fetch_adapter("https://a..b/x.safetensors")


async def test_a_slow_download_delays_no_other_change(tmp_path: Path) -> None:
    write_file(tmp_path / "vinyl.safetensors")
    is_asked, may_answer = threading.Event(), threading.Event()

    def fetch(source: str) -> Path:
        if source == "lab/slow":
            is_asked.set()
            may_answer.wait()
        return tmp_path / "vinyl.safetensors"

    library = make_library(tmp_path, has_store=True, fetch=fetch, loras={"slow": "lab/slow"})
    following = asyncio.create_task(library.follow())
    await until(is_asked.is_set)
    try:
        source = str(tmp_path / "vinyl.safetensors")
        async with asyncio.timeout(PATIENCE_S):
            await library.load(MEDIUM, name="vinyl", source=source)
            assert names(library) == ["vinyl"]
            await library.unload(MEDIUM, name="vinyl")
        assert names(library) == []
    finally:
        may_answer.set()
    await until(lambda: names(library) == ["slow"])
    following.cancel()


def test_a_missing_folder_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    library = make_library(tmp_path, lora_folder=str(tmp_path / "missing"))
    assert names(library) == []
    assert "missing" in caplog.text


async def test_loaded_adapters_are_kept_over_restarts(tmp_path: Path) -> None:
    sha256 = write_file(tmp_path / "vinyl.safetensors")
    path = str(tmp_path / "vinyl.safetensors")
    one, two = (make_library(tmp_path, has_store=True) for _ in range(2))
    card = await one.load(MEDIUM, name="tape", source=path)
    assert (card.name, card.rank, card.sha256) == ("tape", 2, sha256)
    assert names(one) == ["tape"]
    assert names(two) == []
    await two.refresh()
    assert names(two) == names(make_library(tmp_path, has_store=True)) == ["tape"]
    await two.load(MEDIUM, name="tape", source=path)
    with pytest.raises(ConflictError):
        await two.load(MEDIUM, name="tape", source="/other.safetensors")
    await two.unload(MEDIUM, name="tape")
    await one.refresh()
    assert names(one) == []
    with pytest.raises(NotFoundError):
        await one.unload(MEDIUM, name="tape")


async def test_loading_waits_until_other_servers_know_the_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_file(tmp_path / "vinyl.safetensors")
    monkeypatch.setattr(module, "_READ_EVERY_S", 0.02)
    monkeypatch.setattr(module, "_SPREAD_S", 0.5)
    url = f"sqlite:///{tmp_path}/shared.db"
    one, two = (make_library(tmp_path, has_store=True, database_url=url) for _ in range(2))
    following = asyncio.create_task(two.follow())
    await one.load(MEDIUM, name="tape", source=str(tmp_path / "vinyl.safetensors"))
    assert names(two) == ["tape"]
    following.cancel()


async def test_a_failed_download_does_not_replace_a_newer_one(tmp_path: Path) -> None:
    write_file(tmp_path / "tape.safetensors")
    fetching, may_fail = threading.Event(), threading.Event()

    def fetch(source: str) -> Path:
        if fetching.is_set():
            return tmp_path / "tape.safetensors"
        fetching.set()
        may_fail.wait(PATIENCE_S)
        raise InvalidRequestError("the hub does not answer", field="loras", retry_after_s=60.0)

    library = make_library(tmp_path, fetch=fetch, has_store=True, loras={"away": "lab/away"})
    refreshing = asyncio.create_task(library.refresh())
    await until(fetching.is_set)
    await library.load(MEDIUM, name="away", source="lab/away")
    may_fail.set()
    await refreshing
    assert library.resolve(MEDIUM, [Lora("away")])


async def test_only_loaded_adapters_are_unloaded(tmp_path: Path) -> None:
    write_file(tmp_path / "f" / "vinyl.safetensors")
    path = str(tmp_path / "f" / "vinyl.safetensors")
    library = make_library(tmp_path, has_store=True, lora_folder=str(tmp_path / "f"), loras={"tape": path})
    for name in ("vinyl", "tape"):
        with pytest.raises(ConflictError):
            await library.unload(MEDIUM, name=name)
        with pytest.raises(ConflictError):
            await library.load(MEDIUM, name=name, source="/other.safetensors")
    assert names(library) == ["tape", "vinyl"]


async def test_damaged_files_are_not_loaded(tmp_path: Path) -> None:
    (tmp_path / "torn.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    library = make_library(tmp_path, has_store=True)
    for source in (str(tmp_path / "torn.safetensors"), str(tmp_path / "none.safetensors"), "torn.safetensors"):
        with pytest.raises(InvalidRequestError, match=r"torn|none"):
            await library.load(MEDIUM, name="torn", source=source)
    with pytest.raises(InvalidRequestError, match="takes no adapters"):
        await library.load(ModelCard("open", "stable-audio-open"), name="torn", source="/torn.safetensors")
    assert library.cards() == []


async def test_downloads_do_not_delay_the_start(tmp_path: Path) -> None:
    write_file(tmp_path / "f" / "vinyl.safetensors")
    asked: list[str] = []

    def fetch(source: str) -> Path:
        asked.append(source)
        if source == "lab/slow":
            time.sleep(0.2)
        if source == "lab/gone":
            raise InvalidRequestError("there is no repository lab/gone", field="loras")
        if source == "lab/away":
            raise InvalidRequestError("the hub does not answer", field="loras", retry_after_s=60.0)
        return tmp_path / "f" / "vinyl.safetensors"

    loras = {"slow": "lab/slow", "gone": "lab/gone", "away": "lab/away"}
    library = make_library(tmp_path, fetch=fetch, lora_folder=str(tmp_path / "f"), loras=loras)
    assert names(library) == ["vinyl"]
    with pytest.raises(StorageError, match="'slow' is being downloaded") as caught:
        library.resolve(MEDIUM, [Lora("slow")])
    assert caught.value.retry_after_s == 5
    refreshing = asyncio.create_task(library.refresh())
    await until(lambda: "lab/slow" in asked)
    assert library.resolve(MEDIUM, [Lora("vinyl")])
    await refreshing
    assert names(library) == ["slow", "vinyl"]
    (by_source,) = library.resolve(MEDIUM, [Lora("lab/slow")])
    assert (by_source.name, by_source.source) == ("slow", "lab/slow")
    assert "has no adapter" in refusal(library, Lora(str(tmp_path / "f" / "vinyl.safetensors")))
    assert "no repository lab/gone" in refusal(library, Lora("gone"))
    with pytest.raises(StorageError, match="'away': the hub does not answer; retry"):
        library.resolve(MEDIUM, [Lora("away")])
    before = list(asked)
    await library.refresh()
    assert [source for source in asked[len(before) :] if source.startswith("lab/")] == []


def test_settings_name_adapters(tmp_path: Path) -> None:
    def parse(**model: Any) -> Sequence[Any]:
        return Settings.model_validate({"models": [{"name": "medium", **model}]}).models

    assert parse(loras={"my tape (1)": "x"})[0].loras["my tape (1)"].path == "x"
    for bad in ({"a:b": "x"}, {"a+b": "x"}, {"": "x"}, {" a": "x"}, {"a": ""}, {"a": {"path": "x", "other": 1}}, "x"):
        with pytest.raises(ValueError, match="loras"):
            parse(loras=bad)
    for bad_value in ({"max_loras": 0}, {"max_lora_rank": 257}, {"lora_cache_bytes": -1}, {"lora_stacking": "both"}):
        with pytest.raises(ValueError, match=next(iter(bad_value))):
            parse(**bad_value)


@pytest.mark.parametrize("path", [None, "."])
def test_the_packaged_demo_model_has_its_adapter(tmp_path: Path, path: str | None) -> None:
    tree = {"models": [{"name": "demo", "path": path and str(tmp_path)}], "output_dir": str(tmp_path / "out")}
    library = Library(plan_deployments(Settings.model_validate(tree)).settings, CATALOG)
    library.start()
    assert [one.name for one in library.cards("demo")] == ([] if path else ["octave-down"])


async def test_the_demo_model_has_its_own_adapters() -> None:
    settings = Settings.model_validate({"models": [{"name": "demo"}]})
    plan = plan_deployments(settings)
    library = Library(plan.settings, plan.catalog)
    library.start()
    (card,) = library.cards("demo")
    assert (card.name, card.problem, card.public_source) == ("octave-down", None, "octave-down.safetensors")
    with pytest.raises(ConflictError):
        await library.unload(plan.catalog.find("demo"), name="octave-down")


async def test_downloads_are_looked_at_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHECK_AGAIN_S", 0.0)
    monkeypatch.setattr(module, "_RETRY_S", 0.0)
    path = tmp_path / "vinyl.safetensors"
    problems = ["no network"]

    def fetch(_: str) -> Path:
        if problems:
            raise InvalidRequestError(problems[0], field="loras")
        return path

    library = make_library(tmp_path, fetch=fetch, loras={"vinyl": "lab/vinyl"})
    await library.refresh()
    assert refusal(library, Lora("vinyl")) == "adapter 'vinyl': no network"
    problems.clear()
    for seed in (1, 2):
        sha256 = write_file(path, seed=seed)
        await library.refresh()
        assert library.resolve(MEDIUM, [Lora("vinyl")])[0].sha256 == sha256
    problems.append("no network")
    await library.refresh()
    assert library.resolve(MEDIUM, [Lora("vinyl")])[0].sha256 == sha256
