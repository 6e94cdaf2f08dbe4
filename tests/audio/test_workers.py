from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from stable_audio_serve.audio.workers import AudioWorkers
from stable_audio_serve.core.errors import InvalidUploadError
from tests.audio_files import make_audio_file
from tests.patience import PATIENCE_S


@pytest.fixture
async def workers() -> AsyncIterator[AudioWorkers]:
    workers = AudioWorkers(own_rates_hz=())
    yield workers
    await workers.close()


async def test_at_most_two_files_are_encoded_at_once(workers: AudioWorkers) -> None:
    pair = threading.Barrier(2)
    num_running = most_running = 0
    lock = threading.Lock()

    def run() -> None:
        nonlocal num_running, most_running
        with lock:
            num_running += 1
            most_running = max(most_running, num_running)
        pair.wait(PATIENCE_S)
        with lock:
            num_running -= 1

    await asyncio.gather(*(workers.run_encoding(run) for _ in range(10)))
    assert most_running == 2


async def test_decoding_waits_for_earlier_decoding_not_for_encoding(workers: AudioWorkers) -> None:
    started, released = threading.Event(), threading.Event()
    order: list[str] = []

    def read() -> None:
        started.set()
        released.wait(PATIENCE_S)
        order.append("first")

    making = [asyncio.create_task(workers.run_encoding(lambda: released.wait(PATIENCE_S))) for _ in range(4)]
    reading = asyncio.create_task(workers.run_decoding(read))
    waiting = asyncio.create_task(workers.run_decoding(lambda: order.append("second")))
    assert await asyncio.to_thread(started.wait, PATIENCE_S)
    released.set()
    await asyncio.gather(reading, waiting)
    assert order == ["first", "second"]
    assert all(await asyncio.gather(*making))


async def test_a_file_on_disk_is_decoded(workers: AudioWorkers, tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    path.write_bytes(make_audio_file(duration_s=0.5, rate_hz=22050))
    assert (await workers.decode_path(path, max_s=0.2)).samples.shape[1] == pytest.approx(4410, abs=1)
    with path.open("rb") as file:
        assert (await workers.decode(file, max_s=10.0)).samples.shape[1] == 11025
    path.write_bytes(b"no audio")
    with path.open("rb") as file, pytest.raises(InvalidUploadError) as refusal:
        await workers.decode(file, max_s=10.0, field="init_audio")
    assert refusal.value.field == "init_audio"


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priority of their own")
async def test_encoding_threads_have_lower_priority(workers: AudioWorkers) -> None:
    def niceness() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    before = niceness()
    assert await workers.run_encoding(niceness) == min(before + 5, 19)
    assert niceness() == before
