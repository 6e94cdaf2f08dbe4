"""Faults that only a local folder can have. The tests that run for every kind of file store are in `test_stores`."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from stable_audio_serve.artifacts.keys import FOLDERS, artifact_key
from stable_audio_serve.artifacts.local import LocalArtifacts
from stable_audio_serve.artifacts.store import StoredFile
from stable_audio_serve.core.errors import ConfigError, StorageError, StorageFullError, StoreMovedError
from tests.patience import PATIENCE_S


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "not" / "there" / "yet"


@pytest.fixture
def artifacts(folder: Path) -> LocalArtifacts:
    return LocalArtifacts(folder)


KEY = artifact_key("0" * 32, "a.wav", fence=1)


async def read(artifacts: LocalArtifacts, file: StoredFile) -> bytes:
    return b"".join([chunk async for chunk in artifacts.read(file)])


async def put(artifacts: LocalArtifacts, key: str, *chunks: bytes) -> StoredFile:
    return await artifacts.put(key, lambda: chunks, media_type="audio/wav", file_name="a.wav")


def names(folder: Path) -> list[str]:
    """Returns the names of all files in the folder, or an empty list if it does not exist."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    "key",
    [
        "",
        "/",
        "/etc/passwd",
        "..",
        "../x",
        "a/../../x",
        "a/..",
        "a//b",
        "./a",
        "a/.hidden",
        ".hidden",
        "a\\b",
        "a b",
        "a\x00b",
        "a\n",
        "ä",
        "a/b/c/d",
        "x" * 300,
        "~root",
        "a/",
        "C:x",
    ],
)
async def test_keys_cannot_escape_the_folder(artifacts: LocalArtifacts, folder: Path, key: str) -> None:
    with pytest.raises(ValueError):
        await put(artifacts, key, b"x")
    with pytest.raises(ValueError):
        await anext(artifacts.read(StoredFile(key, "audio/wav", "a.wav", 1, "")))
    with pytest.raises(ValueError):
        await artifacts.delete(key)
    assert names(folder) == []


@pytest.mark.parametrize("full_at", ["write", "fsync", "replace"])
async def test_full_disk_is_reported_and_leaves_nothing(
    artifacts: LocalArtifacts, folder: Path, monkeypatch: pytest.MonkeyPatch, full_at: str
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device", str(folder))

    def chunks() -> Iterator[bytes]:
        yield b"half"
        if full_at == "write":
            fail()

    if full_at == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    if full_at == "replace":
        monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(StorageError, match=r"^the disk is full$"):
        await artifacts.put("a", chunks, media_type="audio/wav", file_name="a.wav")
    assert names(folder) == []


async def test_a_file_above_the_process_limit_leaves_nothing(artifacts: LocalArtifacts, folder: Path) -> None:
    """The kernel stops the write at the file size limit of the process. A full disk also stops it within a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(StorageError):
            await put(artifacts, "a", b"x" * 50_000, b"x" * 2_000_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(folder) == []


async def test_reading_never_sees_half_a_file(artifacts: LocalArtifacts, folder: Path) -> None:
    contents = [bytes([number]) * 200_000 for number in range(8)]
    await put(artifacts, "a", contents[0])

    async def write() -> None:
        for content in contents:
            await put(artifacts, "a", content[:1000], content[1000:])

    writing = asyncio.create_task(write())
    while not writing.done():
        assert (folder / "a").read_bytes() in contents
        await asyncio.sleep(0)
    await writing


@pytest.mark.parametrize("replace", [os.mkfifo, os.mkdir])
async def test_other_things_in_a_file_s_place_are_errors(
    artifacts: LocalArtifacts, folder: Path, replace: Callable[[Path], None]
) -> None:
    stored = await put(artifacts, KEY, b"audio")
    (folder / KEY).unlink()
    replace(folder / KEY)
    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(StorageError):
            await read(artifacts, stored)


async def test_full_disk_is_reported_and_usable_after_cleanup(tiny_disk: Path) -> None:
    artifacts = LocalArtifacts(tiny_disk)
    first = await put(artifacts, "uploads/first", bytes(700_000))
    for key in ("a", "uploads/b"):
        with pytest.raises(StorageFullError, match=r"^the disk is full$"):
            await put(artifacts, key, bytes(200_000), bytes(300_000))
    assert names(tiny_disk) == ["uploads/first"]
    assert b"".join([chunk async for chunk in artifacts.read(first)]) == bytes(700_000)
    await artifacts.delete(first.key)
    await put(artifacts, "a", bytes(700_000))


def test_a_full_disk_is_detected_at_startup(tiny_disk: Path) -> None:
    (tiny_disk / "uploads").mkdir()
    with suppress(OSError), (tiny_disk / "filler").open("wb", buffering=0) as filler:
        while True:
            filler.write(bytes(4096))
    with pytest.raises(ConfigError, match=r"^output_dir .*the disk is full"):
        LocalArtifacts(tiny_disk).check()


_KILLED_WRITER = """
import asyncio, sys
from pathlib import Path
from stable_audio_serve.artifacts.local import LocalArtifacts
asyncio.run(LocalArtifacts(Path(sys.argv[1])).put(
    sys.argv[2], lambda: [b"half", b"rest"], media_type="audio/wav", file_name="a.wav"))
"""


@pytest.mark.parametrize("key", [artifact_key("0" * 32, "a.wav", fence=1), f"uploads/{'1' * 32}"])
async def test_unfinished_file_is_not_listed_and_swept_when_old(
    artifacts: LocalArtifacts, folder: Path, key: str
) -> None:
    environ = os.environ | {"STABLE_AUDIO_FAILPOINTS": "mid_upload=kill"}
    writer = await asyncio.create_subprocess_exec(sys.executable, "-c", _KILLED_WRITER, folder, key, env=environ)
    assert await writer.wait() == -signal.SIGKILL
    (left,) = names(folder)
    assert left.endswith(".partial")
    assert [artifacts.list_folder(name).objects for name in FOLDERS] == [()] * len(FOLDERS)
    await put(artifacts, key, b"whole")
    assert artifacts.sweep_unfinished(before=time.time() - 60) == 0
    os.utime(folder / left, (time.time() - 61,) * 2)
    (folder / ".foreign.partial").touch()
    os.utime(folder / ".foreign.partial", (0, 0))
    assert artifacts.sweep_unfinished(before=time.time() - 60) == 1
    assert names(folder) == sorted([key, ".foreign.partial"])


@pytest.mark.parametrize("place", ["file/below", "file", "/proc/self/outputs", "/dev/null"])
def test_unwritable_folder_error_names_the_setting(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ConfigError, match=r"^output_dir \(STABLE_AUDIO_OUTPUT_DIR\): .*cannot be stored") as caught:
        LocalArtifacts(tmp_path / place).check()
    assert place in caught.value.message
    assert caught.value.message.count("stored") == 1


@pytest.fixture
async def claimed(tmp_path: Path) -> LocalArtifacts:
    """Returns a file store in `tmp_path / "files"` that is marked as belonging to one job database."""
    LocalArtifacts(tmp_path / "files").claim("owner")
    return LocalArtifacts(tmp_path / "files", may_make=False)


@pytest.mark.parametrize("instead", ["nothing", "another", "unreadable"])
async def test_moved_folder_is_an_error_and_not_recreated(
    claimed: LocalArtifacts, tmp_path: Path, instead: str
) -> None:
    file = await put(claimed, KEY, b"audio")
    folder, away = tmp_path / "files", tmp_path / "away"
    folder.rename(away)
    if instead == "another":
        LocalArtifacts(folder).claim("another")
    elif instead == "unreadable":  # as with a network share that does not answer
        folder.symlink_to(folder)
    for doing in (put(claimed, KEY, b"more"), read(claimed, file), claimed.delete(file.key), claimed.probe(1)):
        with pytest.raises(StoreMovedError):
            await doing
    for blocking in (claimed.require_place, lambda: claimed.list_folder(""), lambda: claimed.claim("owner")):
        with pytest.raises(StoreMovedError):
            blocking()
    if instead == "unreadable":
        folder.unlink()
    assert folder.exists() == (instead == "another")
    if instead == "another":
        shutil.rmtree(folder)
    shutil.copytree(away, folder)  # the copy is accepted, because its mark names the same database
    assert await read(claimed, file) == b"audio"


async def test_missing_folder_is_not_created(tmp_path: Path) -> None:
    artifacts = LocalArtifacts(tmp_path / "mount" / "files", may_make=False)
    with pytest.raises(StoreMovedError):
        await put(artifacts, KEY, b"audio")
    assert names(tmp_path) == []
    assert not (tmp_path / "mount").exists()


async def test_probe_leaves_nothing_and_checks_free_space(tiny_disk: Path) -> None:
    artifacts = LocalArtifacts(tiny_disk)
    await put(artifacts, KEY, bytes(600_000))
    for num_bytes in (0, 100_000, 400_000):
        await artifacts.probe(num_bytes)
    with pytest.raises(StorageFullError):
        await artifacts.probe(500_000)
    await artifacts.delete(KEY)
    await artifacts.probe(1 << 40)  # more than the disk holds
    assert names(tiny_disk) == []
