"""The process that reads hostile audio files. Started with `python -m`; talks to `audio.decode` over one socket.

Imports as little as possible, limits its own memory, and may crash: its parent starts another.

One exchange: the parent sends a JSON line and the file's descriptor; the answer is a JSON line, followed by float32
samples (S, C) when it has `frames`.
"""

from __future__ import annotations

import json
import os
import resource
import socket
import sys
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

_BLOCK_VALUES = 1 << 18
_MEMORY_BYTES = 2 << 30
_KEPT_CHANNELS = 2  # models use two at most
_MAX_CHANNELS = 32
_RATES_HZ = (1_000, 384_000)
_MAX_LEVEL = 1_000.0  # full scale is 1
_MAGIC = (b"RIFF", b"RF64", b"riff", b"fLaC", b"OggS", b"FORM", b".snd", b"caff", b"ID3")


class Refused(Exception):
    """The file cannot be used; the text is safe to show."""


def sniff(head: bytes) -> None:
    """Raise Refused unless `head`, the first bytes of a file, belongs to a format we read."""
    if not head:
        raise Refused("the file is empty")
    is_mpeg = len(head) > 1 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0
    if not is_mpeg and not head.startswith(_MAGIC):
        raise Refused("not a WAV, FLAC, MP3, OGG or other audio file that can be decoded")


def read(descriptor: int, *, max_s: float, max_values: int) -> tuple[npt.NDArray[np.float32], int]:
    """The first `max_s` seconds as (S, C) float32 and the rate in Hz. Raises Refused."""
    import soundfile

    os.lseek(descriptor, 0, os.SEEK_SET)
    sniff(os.pread(descriptor, 16, 0))
    try:
        with soundfile.SoundFile(descriptor, closefd=False) as file:
            if not _RATES_HZ[0] <= file.samplerate <= _RATES_HZ[1]:
                raise Refused(f"the sample rate {file.samplerate} Hz is outside {_RATES_HZ[0]}..{_RATES_HZ[1]} Hz")
            if file.channels > _MAX_CHANNELS:
                raise Refused(f"{file.channels} channels are more than {_MAX_CHANNELS}")
            limit = min(int(max_s * file.samplerate) + 1, max_values // min(file.channels, _KEPT_CHANNELS))
            return _read_blocks(file, limit), file.samplerate
    except soundfile.LibsndfileError as error:
        raise Refused("the audio cannot be decoded") from error


def _read_blocks(file: Any, limit: int) -> npt.NDArray[np.float32]:
    """Up to `limit` frames of the first two channels; a file that ends early gives what it has."""
    blocks: list[npt.NDArray[np.float32]] = []
    left = limit
    while left > 0:
        block = file.read(min(left, _BLOCK_VALUES // file.channels), dtype="float32", always_2d=True)
        if not len(block):
            break
        block = block[:, :_KEPT_CHANNELS]
        if not np.isfinite(block).all():
            raise Refused("the audio has samples that are not finite numbers")
        if np.abs(block).max() > _MAX_LEVEL:
            raise Refused(f"the audio has samples beyond {_MAX_LEVEL:g} times full scale")
        blocks.append(block)
        left -= len(block)
    if not blocks:
        raise Refused("the file holds no audio")
    return np.concatenate(blocks)


def main() -> None:
    """Serve exchanges on the socket named on the command line until the parent closes it."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    channel = socket.socket(fileno=int(sys.argv[1]))
    channel.sendall(b"ready\n")
    while True:
        message, descriptors, _, _ = socket.recv_fds(channel, 4096, 1)
        if not message:
            return
        task = json.loads(message)
        samples = None
        try:
            samples, rate_hz = read(descriptors[0], max_s=task["max_s"], max_values=task["max_values"])
            answer: dict[str, Any] = {"frames": samples.shape[0], "channels": samples.shape[1], "rate_hz": rate_hz}
        except Refused as error:
            answer = {"refused": str(error)}
        except MemoryError:
            answer = {"refused": "the audio needs too much memory to decode"}
        finally:
            os.close(descriptors[0])
        channel.sendall(json.dumps(answer).encode() + b"\n")
        if samples is not None:
            channel.sendall(np.ascontiguousarray(samples).data)


if __name__ == "__main__":
    main()
