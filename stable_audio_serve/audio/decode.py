"""Decode uploaded audio and read its embedded text, in a separate process, because files are untrusted.

The child process has a minimal environment and inherits no threads, devices or sockets. If it crashes or hangs, the
next call starts another one.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from stable_audio_serve.core.errors import InvalidUploadError, OverloadedError
from stable_audio_serve.core.generation import SourceAudio

if TYPE_CHECKING:
    import numpy.typing as npt

_MAX_VALUES = 80_000_000  # largest samples x channels after mixing to stereo: 320 MB of float32, or 416 s at 96 kHz
_START_TIMEOUT_S = 30.0
_START_RETRY_S = 5.0


class AudioDecoder:
    """Decodes files in a child process, which starts on first use. Methods block: call them from one worker thread."""

    def __init__(self, *, timeout_s: float = 20.0, own_rates_hz: Collection[int] = ()) -> None:
        """Create a decoder without starting its process.

        `timeout_s` is the time limit for decoding one file. `own_rates_hz` are sample rates that are accepted in
        addition to 8-192 kHz.
        """
        self._limits = {"max_values": _MAX_VALUES, "own_rates_hz": sorted(own_rates_hz)}
        self._timeout_s = timeout_s
        self._process: DecodeProcess | None = None

    def decode(
        self, file: IO[bytes], *, max_s: float, allowed_s: tuple[float, float] | None = None, field: str = "audio"
    ) -> SourceAudio:
        """Return the first `max_s` seconds of `file`, mono or stereo, not resampled. `file` needs a file descriptor.

        `allowed_s` is the shortest and the longest duration that the whole file may have, in seconds. Raises
        InvalidUploadError, which names `field`, if the file cannot be used. Raises OverloadedError if no decoding
        process can be started.
        """
        answer, payload = self._ask(file, self._limits | {"max_s": max_s, "allowed_s": allowed_s}, field=field)
        interleaved = payload.view(np.float32).reshape(answer["frames"], answer["channels"])
        return SourceAudio(np.ascontiguousarray(interleaved.T), answer["rate_hz"])

    def read_text(self, file: IO[bytes], *, field: str = "audio") -> str | None:
        """Return the text embedded in `file`, see `embedded_text.extract`. Raises the same errors as `decode`."""
        answer, payload = self._ask(file, None, field=field)
        return payload.tobytes().decode() if answer["has_text"] else None

    def _ask(
        self, file: IO[bytes], limits: dict[str, Any] | None, *, field: str
    ) -> tuple[dict[str, Any], npt.NDArray[np.uint8]]:
        file.flush()
        try:
            try:
                return self._ask_once(file.fileno(), limits)
            except _WorkerLostError:  # perhaps not because of the file, but because of too little memory
                return self._ask_once(file.fileno(), limits)
        except _FileRefusedError as error:
            raise InvalidUploadError(f"{field}: {error}", field=field) from error
        except TimeoutError as error:
            raise InvalidUploadError(f"{field}: decoding the file took too long", field=field) from error
        except _WorkerLostError as error:
            raise InvalidUploadError(f"{field}: decoding the file failed", field=field) from error

    def _ask_once(self, descriptor: int, limits: dict[str, Any] | None) -> tuple[dict[str, Any], npt.NDArray[np.uint8]]:
        if self._process is None or not self._process.is_alive():
            self._process = DecodeProcess.start()
        try:
            return self._process.ask(descriptor, limits, timeout_s=self._timeout_s)
        except (_WorkerLostError, TimeoutError):
            self.close()
            raise

    def close(self) -> None:
        """Stop the child process. A later call of `decode` or `read_text` starts another one."""
        if self._process is not None:
            self._process.stop()
            self._process = None


class _FileRefusedError(Exception):
    """The file cannot be used. The message says why."""


class _WorkerLostError(Exception):
    """The process died while decoding a file."""


@dataclass(slots=True)
class DecodeProcess:
    """One decoding process and its socket. Create it with `start`."""

    process: subprocess.Popen[bytes]
    channel: socket.socket

    @classmethod
    def start(cls) -> DecodeProcess:
        """Start a process and wait until it is ready. Raises OverloadedError if none can be started."""
        ours, theirs = socket.socketpair()
        environment = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
        environment |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OPENBLAS_NUM_THREADS": "1"}
        worker = None
        try:
            with theirs:
                process = subprocess.Popen(
                    [sys.executable, "-m", "stable_audio_serve.audio.decode_worker", str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,  # Ctrl-C then reaches only the server, which stops this process
                )
            worker = cls(process, ours)
            worker._read_line(time.monotonic() + _START_TIMEOUT_S)
        except (OSError, EOFError) as error:
            if worker is not None:
                worker.stop()
            ours.close()
            raise OverloadedError("no audio file can be decoded now", retry_after_s=_START_RETRY_S) from error
        return worker

    def is_alive(self) -> bool:
        return self.process.poll() is None

    def stop(self) -> None:
        self.channel.close()
        self.process.kill()
        self.process.wait()

    def ask(
        self, descriptor: int, limits: dict[str, Any] | None, *, timeout_s: float
    ) -> tuple[dict[str, Any], npt.NDArray[np.uint8]]:
        """Send a file to `audio.decode_worker`. Returns its response and the bytes that follow the response.

        Without `limits` the worker reads the embedded text instead of the samples. Raises _FileRefusedError for a file
        that cannot be used. Raises TimeoutError, or _WorkerLostError if the process died. After either of the last two
        errors, call `stop`.
        """
        deadline_at = time.monotonic() + timeout_s
        task = json.dumps(limits).encode()
        try:
            self.channel.settimeout(timeout_s)
            socket.send_fds(self.channel, [task], [descriptor])
            answer: dict[str, Any] = json.loads(self._read_line(deadline_at))
            if "refused" in answer:
                raise _FileRefusedError(answer["refused"])
            payload = np.empty(answer["num_bytes"], dtype=np.uint8)
            self._read_into(payload.data, deadline_at)
        except TimeoutError:
            raise
        except (OSError, EOFError) as error:
            raise _WorkerLostError("the decoding process died") from error
        return answer, payload

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
