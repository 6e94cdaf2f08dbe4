"""Decodes uploaded audio. Files are hostile until proven otherwise, so a separate process reads them.

The process is a plain child with an environment of its own: it inherits no threads, devices or sockets, may crash or
hang, and is replaced when it does.
"""

from __future__ import annotations

import json
import os
import queue
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import IO, Any

import numpy as np

from stable_audio_serve.core.errors import InvalidUploadError
from stable_audio_serve.core.generation import SourceAudio

_MAX_VALUES = 80_000_000  # kept samples x channels, 320 MB: 410 s of stereo at 96 kHz
_START_TIMEOUT_S = 30.0


class AudioDecoder:
    """A pool of decoding processes, each started when first needed. `decode` blocks: call it from worker threads."""

    def __init__(self, *, num_workers: int = 1, timeout_s: float = 60.0) -> None:
        """`timeout_s` bounds the decoding of one file, seconds."""
        self._timeout_s = timeout_s
        self._idle: queue.LifoQueue[_Worker | None] = queue.LifoQueue()
        for _ in range(num_workers):
            self._idle.put(None)

    def decode(self, file: IO[bytes], *, max_s: float, field: str = "audio") -> SourceAudio:
        """The first `max_s` seconds of `file` (anything with a `fileno`), at most two channels, at the file's rate.

        Raises InvalidUploadError naming `field`.
        """
        worker = self._idle.get()
        try:
            if worker is None or not worker.is_alive():
                worker = None
                worker = _Worker.start()
            file.flush()
            return worker.decode(file.fileno(), max_s=max_s, timeout_s=self._timeout_s)
        except _FileRefusedError as error:
            raise InvalidUploadError(f"{field}: {error}", field=field) from error
        except _WorkerLostError as error:
            assert worker is not None
            worker.stop()
            worker = None
            raise InvalidUploadError(f"{field}: decoding the file {error}", field=field) from error
        finally:
            self._idle.put(worker)

    def worker_pids(self) -> list[int]:
        """Process ids of the idle workers."""
        return [worker.process.pid for worker in list(self._idle.queue) if worker is not None]

    def close(self) -> None:
        """Stop every idle process; a later `decode` starts a new one."""
        workers = [self._idle.get_nowait() for _ in range(self._idle.qsize())]
        for worker in workers:
            if worker is not None:
                worker.stop()
            self._idle.put(None)


class _FileRefusedError(Exception):
    """The worker's verdict on a file."""


class _WorkerLostError(Exception):
    """The worker crashed or hung over a file; the text says which."""


@dataclass(slots=True)
class _Worker:
    process: subprocess.Popen[bytes]
    channel: socket.socket

    @classmethod
    def start(cls) -> _Worker:
        ours, theirs = socket.socketpair()
        environment = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
        environment |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OPENBLAS_NUM_THREADS": "1"}
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", "stable_audio_serve.audio.decode_worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C in the terminal is for the server, which stops us itself
            )
        worker = cls(process, ours)
        try:
            worker._read_line(time.monotonic() + _START_TIMEOUT_S)
        except BaseException:
            worker.stop()
            raise
        return worker

    def is_alive(self) -> bool:
        return self.process.poll() is None

    def stop(self) -> None:
        self.channel.close()
        self.process.kill()
        self.process.wait()

    def decode(self, descriptor: int, *, max_s: float, timeout_s: float) -> SourceAudio:
        deadline = time.monotonic() + timeout_s
        task = json.dumps({"max_s": max_s, "max_values": _MAX_VALUES}).encode()
        try:
            self.channel.settimeout(timeout_s)
            socket.send_fds(self.channel, [task], [descriptor])
            answer: dict[str, Any] = json.loads(self._read_line(deadline))
            if "refused" in answer:
                raise _FileRefusedError(answer["refused"])
            interleaved = np.empty((answer["frames"], answer["channels"]), dtype=np.float32)
            self._read_into(interleaved.reshape(-1).view(np.uint8).data, deadline)
        except TimeoutError as error:
            raise _WorkerLostError("took too long") from error
        except (OSError, EOFError) as error:
            raise _WorkerLostError("failed") from error
        return SourceAudio(np.ascontiguousarray(interleaved.T), answer["rate_hz"])

    def _read_line(self, deadline: float) -> bytes:
        line = bytearray()
        while not line.endswith(b"\n"):
            byte = bytearray(1)
            self._read_into(memoryview(byte), deadline)
            line += byte
        return bytes(line)

    def _read_into(self, buffer: memoryview, deadline: float) -> None:
        while len(buffer):
            self.channel.settimeout(max(deadline - time.monotonic(), 1e-3))
            received = self.channel.recv_into(buffer)
            if not received:
                raise EOFError("the decoding process ended")
            buffer = buffer[received:]
