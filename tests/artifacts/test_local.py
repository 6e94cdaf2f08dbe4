from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import resource
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stable_audio_serve.artifacts.local import LocalArtifacts
from stable_audio_serve.artifacts.store import StoredFile
from stable_audio_serve.core.errors import StorageError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "not" / "there" / "yet"


@pytest.fixture
def artifacts(folder: Path) -> LocalArtifacts:
    return LocalArtifacts(folder)


async def put(artifacts: LocalArtifacts, key: str, *chunks: bytes) -> StoredFile:
    return await artifacts.put(key, chunks, media_type="audio/wav", file_name="a.wav")


def names(folder: Path) -> list[str]:
    """Of every file below the folder, which need not be there."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


async def test_a_file_comes_back_as_it_was_put(artifacts: LocalArtifacts, folder: Path) -> None:
    data = os.urandom(2_500_000)
    file = await put(artifacts, "uploads/abc", data[:10], data[10:], b"")
    assert file == StoredFile("uploads/abc", "audio/wav", "a.wav", len(data), hashlib.sha256(data).hexdigest())
    chunks = [chunk async for chunk in artifacts.read(file.key)]
    assert b"".join(chunks) == data
    assert max(map(len, chunks)) <= 1_048_576
    assert names(folder) == ["uploads/abc"]


async def test_a_second_put_replaces_the_file_as_a_whole(artifacts: LocalArtifacts, folder: Path) -> None:
    await put(artifacts, "a", b"first and longer")
    await put(artifacts, "a", b"second")
    assert [chunk async for chunk in artifacts.read("a")] == [b"second"]
    assert names(folder) == ["a"]


async def test_a_deleted_file_is_gone_before_the_first_chunk(artifacts: LocalArtifacts) -> None:
    await put(artifacts, "a", b"x")
    await artifacts.delete("a")
    await artifacts.delete("a")
    with pytest.raises(FileNotFoundError):
        await anext(artifacts.read("a"))


@pytest.mark.parametrize(
    "key",
    [
        *(
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
        ),
        *("a\x00b", "a\n", "ä", "a/b/c/d", "x" * 300, "~root", "a/", "C:x"),
    ],
)
async def test_no_key_leads_out_of_the_folder(artifacts: LocalArtifacts, folder: Path, key: str) -> None:
    with pytest.raises(ValueError):
        await put(artifacts, key, b"x")
    with pytest.raises(ValueError):
        await anext(artifacts.read(key))
    with pytest.raises(ValueError):
        await artifacts.delete(key)
    assert names(folder) == []


async def test_a_source_that_breaks_off_leaves_nothing(artifacts: LocalArtifacts, folder: Path) -> None:
    def chunks() -> Iterator[bytes]:
        yield b"half"
        raise OSError(errno.EIO, "the upload cannot be read")

    with pytest.raises(StorageError):
        await artifacts.put("a", chunks(), media_type="audio/wav", file_name="a.wav")
    assert names(folder) == []


@pytest.mark.parametrize("full_at", ["write", "fsync", "replace"])
async def test_a_full_disk_is_said_and_leaves_nothing(
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
        await artifacts.put("a", chunks(), media_type="audio/wav", file_name="a.wav")
    assert names(folder) == []


async def test_a_file_above_the_process_limit_leaves_nothing(artifacts: LocalArtifacts, folder: Path) -> None:
    """The kernel itself refuses in the middle of a write, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(StorageError):
            await put(artifacts, "a", b"x" * 50_000, b"x" * 2_000_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(folder) == []


async def test_a_cancelled_put_leaves_nothing(artifacts: LocalArtifacts, folder: Path) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def chunks() -> Iterator[bytes]:
        yield b"half"
        begun.set()
        go_on.wait(5)
        yield b"rest"

    task = asyncio.create_task(artifacts.put("a", chunks(), media_type="audio/wav", file_name="a.wav"))
    await asyncio.to_thread(begun.wait, 5)
    task.cancel()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert names(folder) == []


async def test_reading_never_sees_half_a_file(artifacts: LocalArtifacts) -> None:
    contents = [bytes([number]) * 200_000 for number in range(8)]
    await put(artifacts, "a", contents[0])

    async def write() -> None:
        for content in contents:
            await put(artifacts, "a", content[:1000], content[1000:])

    writing = asyncio.create_task(write())
    while not writing.done():
        assert b"".join([chunk async for chunk in artifacts.read("a")]) in contents
    await writing
