"""Threads and processes that decode uploads and encode files, so that the event loop stays free."""

from __future__ import annotations

import asyncio
import hashlib
import os
import sys
import threading
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import IO, TypeVar

from stable_audio_serve.audio.decode import AudioDecoder
from stable_audio_serve.core.generation import SourceAudio

T = TypeVar("T")

MAX_DECODE_S = 20.0  # time limit for decoding one file
MAX_SOURCE_BYTES = 2**30  # limit per process for the decoded source audio of all requests or jobs in progress
_NICENESS = 5


class AudioWorkers:
    """Worker threads and processes. One upload is decoded and two files are encoded at a time; further calls wait."""

    def __init__(self, *, own_rates_hz: Collection[int]) -> None:
        """Create the threads' pools without starting a process. `AudioDecoder` explains `own_rates_hz`."""
        self._decoder = AudioDecoder(timeout_s=MAX_DECODE_S, own_rates_hz=own_rates_hz)
        self._decode_threads = ThreadPoolExecutor(1, thread_name_prefix="audio-decode")
        self._encode_threads = ThreadPoolExecutor(2, thread_name_prefix="audio-encode", initializer=_yield_to_others)

    async def decode(
        self, file: IO[bytes], *, max_s: float, allowed_s: tuple[float, float] | None = None, field: str = "audio"
    ) -> SourceAudio:
        """Return the first `max_s` seconds of an open file, with the file's hash. `AudioDecoder.decode` has details."""
        return await self.run_decoding(lambda: self._decode(file, max_s=max_s, allowed_s=allowed_s, field=field))

    async def read_text(self, file: IO[bytes], *, field: str) -> str | None:
        """Return the text embedded in an open file, see `AudioDecoder.read_text`."""
        return await self.run_decoding(lambda: self._decoder.read_text(file, field=field))

    async def decode_path(self, path: Path, *, max_s: float) -> SourceAudio:
        """Return the first `max_s` seconds of the file at `path`, like `decode`. Also raises OSError."""

        def decode() -> SourceAudio:
            with path.open("rb") as file:
                return self._decode(file, max_s=max_s, allowed_s=None, field="audio")

        return await self.run_decoding(decode)

    def _decode(
        self, file: IO[bytes], *, max_s: float, allowed_s: tuple[float, float] | None, field: str
    ) -> SourceAudio:
        audio = self._decoder.decode(file, max_s=max_s, allowed_s=allowed_s, field=field)
        return replace(audio, sha256=hash_file(file))

    async def run_decoding(self, function: Callable[[], T]) -> T:
        """Run `function`, which reads or writes uploads, on the decoding thread, and return its result."""
        return await asyncio.get_running_loop().run_in_executor(self._decode_threads, function)

    async def run_encoding(self, function: Callable[[], T]) -> T:
        """Run `function`, which encodes a file, on an encoding thread, and return its result."""
        return await asyncio.get_running_loop().run_in_executor(self._encode_threads, function)

    async def close(self) -> None:
        """Wait for running work, then stop threads and processes."""
        for threads in (self._encode_threads, self._decode_threads):
            await asyncio.to_thread(threads.shutdown, cancel_futures=True)
        self._decoder.close()


def hash_file(file: IO[bytes]) -> str:
    """Return the SHA-256 of an open file in hexadecimal. Recipes identify source files by this hash."""
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]  # accepts any binary file


def _yield_to_others() -> None:
    """Lower this thread's priority below that of the event loop and the models. Linux only.

    Measured on two cores, with MP3 encoding for all requests: with this lower priority, the engine's denoising steps
    are 1.08 times as fast, and the event loop waits 0.6 times as long for a core.
    """
    if sys.platform == "linux":
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, min(os.getpriority(os.PRIO_PROCESS, thread) + _NICENESS, 19))
