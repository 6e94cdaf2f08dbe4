"""What every artifact store must do. Each test runs with a local folder and with a bucket behind HTTP."""

from __future__ import annotations

import asyncio
import errno
import gc
import hashlib
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import structlog

from stable_audio_serve.artifacts import store as store_module
from stable_audio_serve.artifacts.keys import artifact_key, new_key
from stable_audio_serve.artifacts.local import LocalArtifacts
from stable_audio_serve.artifacts.s3 import S3Artifacts
from stable_audio_serve.artifacts.store import ArtifactStore, StoredFile
from stable_audio_serve.core.errors import DamagedFileError, StorageError
from tests.object_storage import ObjectStorage
from tests.patience import PATIENCE_S
from tests.recorded_metrics import RecordedMetrics

MIB = 1_048_576
KEY = artifact_key("0" * 32, "a.wav", fence=1)


@dataclass
class Place:
    """An artifact store, and functions that access its folder or bucket directly."""

    store: ArtifactStore
    metrics: RecordedMetrics
    names: Callable[[], list[str]]  # names of all files, including hidden and unfinished ones
    write: Callable[[str, bytes], None]  # writes a file (key, content), bypassing the store


def local_place(folder: Path) -> Place:
    def names() -> list[str]:
        return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())

    def write(key: str, data: bytes) -> None:
        (folder / key).parent.mkdir(parents=True, exist_ok=True)
        (folder / key).write_bytes(data)

    metrics = RecordedMetrics()
    return Place(LocalArtifacts(folder, metrics=metrics), metrics, names, write)


def s3_place(storage: ObjectStorage) -> Place:
    bucket = storage.make_bucket()

    def names() -> list[str]:
        return sorted(key.removeprefix("a/b/") for key in (*storage.keys(bucket), *storage.unfinished(bucket)))

    def write(key: str, data: bytes) -> None:
        storage.client.put_object(Bucket=bucket, Key=f"a/b/{key}", Body=data)

    metrics = RecordedMetrics()
    return Place(S3Artifacts(storage.settings(bucket, prefix="a/b"), metrics=metrics), metrics, names, write)


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.server)])
async def place(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Place]:
    if request.param == "local":
        made = local_place(tmp_path / "not" / "there" / "yet")
    else:
        made = s3_place(request.getfixturevalue("object_storage"))
    yield made
    await made.store.close()


async def put(place: Place, *chunks: bytes, key: str = KEY, name: str = "a.wav") -> StoredFile:
    return await place.store.put(key, lambda: chunks, media_type="audio/wav", file_name=name)


async def read(place: Place, file: StoredFile) -> bytes:
    return b"".join([chunk async for chunk in place.store.read(file)])


@pytest.mark.parametrize("num_bytes", [0, 1, MIB, MIB + 1, 3 * MIB, 17 * MIB + 3])
async def test_read_returns_what_was_put(place: Place, num_bytes: int) -> None:
    data = os.urandom(num_bytes)
    pieces = [data[:10], b"", *(data[start : start + MIB] for start in range(10, num_bytes, MIB))]
    file = await put(place, *pieces)
    assert file == StoredFile(KEY, "audio/wav", "a.wav", num_bytes, hashlib.sha256(data).hexdigest())
    chunks = [chunk async for chunk in place.store.read(file)]
    assert b"".join(chunks) == data
    assert max(map(len, chunks), default=0) <= MIB
    assert place.names() == [KEY]


@pytest.mark.parametrize(
    ("start", "stop"), [(0, 1), (MIB - 1, MIB + 1), (5, 2 * MIB + 7), (3 * MIB - 1, 3 * MIB), (0, 3 * MIB)]
)
async def test_a_part_has_exactly_its_bytes(place: Place, start: int, stop: int) -> None:
    data = os.urandom(3 * MIB)
    file = await put(place, data)
    chunks = [chunk async for chunk in place.store.read_part(file, start=start, stop=stop)]
    assert b"".join(chunks) == data[start:stop]
    assert max(map(len, chunks)) <= MIB


async def test_a_missing_part_is_an_error(place: Place) -> None:
    file = await put(place, bytes(3 * MIB))
    place.write(KEY, bytes(2 * MIB))
    read = bytearray()

    async def download() -> None:
        async for chunk in place.store.read_part(file, start=MIB, stop=3 * MIB):
            read.extend(chunk)

    with pytest.raises(DamagedFileError):
        await download()
    assert read == bytes(MIB)
    assert place.metrics.counters == {"damaged_files": 1}
    with pytest.raises(StorageError):  # nothing of the part exists
        await anext(place.store.read_part(file, start=2 * MIB + 5, stop=3 * MIB))
    await place.store.delete(KEY)
    with pytest.raises(FileNotFoundError):
        await anext(place.store.read_part(file, start=1000, stop=3000))


@pytest.mark.parametrize("content", [bytes(2000), bytes(4000), bytes(2999) + b"x"], ids=["short", "long", "changed"])
async def test_parts_of_a_damaged_small_file_are_refused(place: Place, content: bytes) -> None:
    file = await put(place, bytes(3000))
    place.write(KEY, content)
    with pytest.raises(DamagedFileError):
        await anext(place.store.read_part(file, start=1000, stop=1500))
    assert place.metrics.counters == {"damaged_files": 1}


async def test_a_second_put_replaces_the_file_as_a_whole(place: Place) -> None:
    await put(place, b"first and longer")
    second = await put(place, b"second")
    assert await read(place, second) == b"second"
    assert place.names() == [KEY]


async def test_deleted_file_raises_before_the_first_chunk(place: Place) -> None:
    file = await put(place, b"x")
    await place.store.delete(KEY)
    await place.store.delete(KEY)
    with pytest.raises(FileNotFoundError):
        await anext(place.store.read(file))
    assert place.names() == []


@pytest.mark.parametrize("size", [3, 17 * MIB])
async def test_interrupted_source_leaves_nothing(place: Place, size: int) -> None:
    class SourceError(Exception):
        pass

    num_reads = 0

    def chunks() -> Iterator[bytes]:
        nonlocal num_reads
        num_reads += 1
        yield bytes(size)
        if size == 3 or num_reads == 2 or place.store.backend_name == "local":
            raise SourceError

    with pytest.raises(SourceError):
        await place.store.put(KEY, chunks, media_type="audio/wav", file_name="a.wav")
    assert place.names() == []


@pytest.mark.parametrize("size", [3, 10 * MIB])
async def test_a_cancelled_put_leaves_nothing(place: Place, size: int) -> None:
    begun, resumed = threading.Event(), threading.Event()
    logged: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: logged.append(context["message"]))

    num_taken = 0

    def chunks() -> Iterator[bytes]:
        nonlocal num_taken
        yield bytes(size)
        begun.set()
        resumed.wait(PATIENCE_S)
        for num_taken in range(10):  # noqa: B007  counts the chunks that were read
            yield bytes(size)

    task = asyncio.create_task(place.store.put(KEY, chunks, media_type="audio/wav", file_name="a.wav"))
    await asyncio.to_thread(begun.wait, PATIENCE_S)
    task.cancel()
    asyncio.get_running_loop().call_later(0.05, resumed.set)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert place.names() == []
    assert num_taken == 0  # after the cancellation, `put` takes no further chunk
    await place.store.delete(KEY)  # until the event loop knows how the abandoned work ended
    del task
    gc.collect(1)  # the new objects; a full collection would take a second
    assert logged == []  # asyncio would log a traceback for each cancelled upload that then stops


async def test_a_put_cancelled_at_any_time_leaves_nothing(place: Place) -> None:
    """Some cancellations come after `put` has written the whole file."""
    for turns in range(0, 60, 3):
        task = asyncio.create_task(put(place, b"x" * 100))
        for _ in range(turns):
            await asyncio.sleep(0.0005)
        was_done = task.done()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        if was_done:
            await place.store.delete(KEY)
        assert place.names() == []


@pytest.mark.parametrize("num_bytes", [MIB, 2 * MIB + 5])
@pytest.mark.parametrize("damage", ["flipped", "cut", "longer", "empty"])
async def test_damaged_file_is_never_returned_complete(place: Place, num_bytes: int, damage: str) -> None:
    """Reading a damaged file raises before the last byte is returned. A file of one chunk returns no byte at all."""
    data = os.urandom(num_bytes)
    file = await put(place, data)
    damaged = {
        "flipped": data[:-1] + bytes([data[-1] ^ 1]),
        "cut": data[:-1],
        "longer": data + b"x",
        "empty": b"",
    }[damage]
    place.write(KEY, damaged)
    got = []

    async def read_all() -> None:
        async for chunk in place.store.read(file):
            got.append(chunk)  # noqa: PERF401  keeps the chunks before the error

    with pytest.raises(DamagedFileError):
        await read_all()
    assert sum(map(len, got)) <= max(0, num_bytes - 1)
    assert num_bytes > MIB or not got
    assert place.metrics.counters == {"damaged_files": 1}


async def test_work_logs_with_the_id_of_its_request(place: Place) -> None:
    seen: list[object] = []

    def chunks() -> list[bytes]:
        seen.append(structlog.contextvars.get_contextvars())
        return [b"sound"]

    merge = structlog.contextvars.merge_contextvars
    with structlog.testing.capture_logs(processors=[merge]) as lines:
        with structlog.contextvars.bound_contextvars(request_id="r1"):
            file = await place.store.put(KEY, chunks, media_type="audio/wav", file_name="a.wav")
        place.write(KEY, b"noise")
        with structlog.contextvars.bound_contextvars(request_id="r2"), pytest.raises(DamagedFileError):
            await read(place, file)
    assert seen
    assert all(values == {"request_id": "r1"} for values in seen)
    assert [(line["event"], line["request_id"]) for line in lines] == [("a stored file is damaged", "r2")]


async def test_work_without_a_free_thread_is_refused_in_time(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise, clients of a service that hangs would wait the longer the more of them there are."""
    file, may_end = await put(place, b"x"), threading.Event()

    def block() -> list[bytes]:
        may_end.wait()
        return [b"sound"]

    keys = [new_key("uploads") for _ in range(20)]  # more than there are threads
    puts = [place.store.put(key, block, media_type="audio/wav", file_name="a.wav") for key in keys]
    async with asyncio.timeout(PATIENCE_S):
        with monkeypatch.context() as hurried:
            hurried.setattr(store_module, "_BEGIN_WITHIN_S", 0.1)
            putting = [asyncio.create_task(one) for one in puts]
            await asyncio.wait(putting, return_when=asyncio.FIRST_EXCEPTION)
            for doing in (read(place, file), place.store.delete(KEY), place.store.probe(1)):
                with pytest.raises(StorageError, match="busy with slow calls"):
                    await doing
        may_end.set()
        outcomes = await asyncio.gather(*putting, return_exceptions=True)
        assert await read(place, file) == b"x"
    stored = [outcome.key for outcome in outcomes if isinstance(outcome, StoredFile)]
    assert {type(outcome) for outcome in outcomes} == {StoredFile, StorageError}
    assert place.names() == sorted([KEY, *stored])


async def test_abandoned_reader_leaves_the_store_usable(place: Place) -> None:
    file = await put(place, os.urandom(3 * MIB))
    for _ in range(40):
        chunks = place.store.read(file)
        await anext(chunks)
        await chunks.aclose()
    for _ in range(10):
        reading = asyncio.create_task(anext(place.store.read(file)))  # type: ignore[arg-type]
        await asyncio.sleep(0.001)
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
    assert len(await read(place, file)) == 3 * MIB


async def test_only_our_own_keys_are_listed_by_folder(place: Place) -> None:
    started_at = time.time()
    ids = (
        "1" * 32,
        "2" * 64,
        "6f9619ff-8b86-d011-b42d-00c04fc964ff",
        "6f9619ff-8b86-d011-b42d-00c04fc964ff:stable-audio",
    )
    jobs = [artifact_key(job_id, "stable audio ä.wav", fence=fence) for job_id in ids for fence in (1, 2)]
    uploads, files = [new_key("uploads")], [new_key("files")]
    for key in (*jobs, *uploads, *files):
        await put(place, b"12345", key=key)
    for key in ("foreign.wav", "jobs.db", "uploads/holiday.jpg", "files/sub/a", "other/a.wav", "1" * 32):
        place.write(key, b"x")
    for folder, keys in (("", jobs), ("uploads", uploads), ("files", files)):
        page = place.store.list_folder(folder)
        assert page.next_cursor is None
        assert sorted(item.key for item in page.objects) == sorted(keys)
        for item in page.objects:
            assert started_at - 2 < item.modified_at < time.time() + 2


async def test_a_large_folder_comes_in_pages(place: Place) -> None:
    keys = [new_key("uploads") for _ in range(7)]
    for key in keys:
        place.write(key, b"x")
    found, cursor, num_pages = [], None, 0
    while num_pages == 0 or cursor:
        page = place.store.list_folder("uploads", cursor=cursor, limit=3)
        found += [item.key for item in page.objects]
        cursor, num_pages = page.next_cursor, num_pages + 1
    assert sorted(found) == sorted(keys)
    assert num_pages == 3


async def test_an_empty_store_lists_nothing(place: Place) -> None:
    assert place.store.list_folder("uploads").objects == ()
    assert place.store.sweep_unfinished(before=time.time()) == 0


async def test_check_passes_and_leaves_nothing(place: Place) -> None:
    await asyncio.to_thread(place.store.check)
    assert place.names() == []


async def test_many_files_at_once(place: Place) -> None:
    data = {new_key("uploads"): os.urandom(300_000) for _ in range(20)}  # more than there are threads
    files = await asyncio.gather(*(put(place, content, key=key) for key, content in data.items()))
    assert await asyncio.gather(*(read(place, file) for file in files)) == list(data.values())


async def test_replaced_content_is_refused(place: Place) -> None:
    file = await put(place, b"abc")
    with pytest.raises(DamagedFileError):
        await read(place, replace(file, sha256="0" * 64))


async def test_a_folder_without_hard_links_is_claimed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(source: Path, target: Path) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    store = LocalArtifacts(tmp_path)
    assert store.claim("a") is not None
    assert (store.claim("a") is not None, store.claim("b")) == (True, None)
    assert os.listdir(tmp_path) == [".owner"]
    (tmp_path / ".owner").write_bytes(b"\xff")
    assert store.claim("a") is None


async def test_store_belongs_to_the_first_claimer(place: Place) -> None:
    started_at = time.time()
    claims = await asyncio.gather(*(asyncio.to_thread(place.store.claim, owner) for owner in "abcdef"))
    (since,) = [claim for claim in claims if claim is not None]
    assert started_at - 2 < since < time.time() + 2
    winner = "abcdef"[claims.index(since)]
    assert [place.store.claim(owner) for owner in (winner, "x", winner)] == [since, None, since]
    assert place.store.list_folder("").objects == ()
    assert [name.rpartition("/")[2] for name in place.names()] == [".owner"]
