"""Embeds a text, a JSON object, in an encoded audio file, where players ignore it, and reads it back.

In FLAC, Ogg Vorbis, Opus and MP3 files it is the comment, which libsndfile reads and writes. In WAV files it is an
ID3v2.4 tag with a TXXX frame, in a chunk after the samples: libsndfile would put it first and truncate it to 4 kB.
"""

from __future__ import annotations

import re
import struct
from typing import BinaryIO

MOST_TEXT_BYTES = 1_048_576

_NAME = b"STABLE_AUDIO_RECIPE"
_UTF8 = b"\3"
_CHUNK_NAMES = {b"id3 ", b"ID3 "}  # some editors write the upper-case name
_MOST_CHUNKS = 256
_FRAME_HEADER_BYTES = 10
_FRAME = re.compile(rb"TXXX([\x00-\x7f]{4}).." + _UTF8 + _NAME + rb"\0", re.DOTALL)


def make_wav_chunk(text: str) -> bytes:
    """Returns a chunk for the end of a WAV file; it must begin at an even offset."""
    content = _UTF8 + _NAME + b"\0" + text.encode()
    frame = b"TXXX" + _to_syncsafe(len(content)) + bytes(2) + content
    tag = b"ID3\x04\0\0" + _to_syncsafe(len(frame)) + frame
    return struct.pack("<4sI", b"id3 ", len(tag)) + tag + bytes(len(tag) % 2)


def extract(file: BinaryIO) -> str | None:
    """Returns the text in an audio file; None if there is none that begins like a JSON object.

    The text may come from another program. libsndfile reads the file, so open untrusted files with
    `AudioDecoder.read_text`. Raises ValueError if the file is not audio or the text exceeds 1 MiB.
    """
    import soundfile

    text = _read_wav_chunk(file)
    if text is None:
        file.seek(0)
        try:
            with soundfile.SoundFile(file) as sound:
                text = sound.comment
        except soundfile.LibsndfileError as error:
            raise ValueError("the audio cannot be decoded") from error
    if len(text) > MOST_TEXT_BYTES:
        raise ValueError(f"the text in the file is longer than {MOST_TEXT_BYTES} bytes")
    return text if text.startswith("{") else None


def _read_wav_chunk(file: BinaryIO) -> str | None:
    file.seek(0)
    riff = file.read(12)
    if riff[:4] + riff[8:] != b"RIFFWAVE":
        return None
    for _ in range(_MOST_CHUNKS):
        header = file.read(8)
        if len(header) < 8:
            return None
        name, num_bytes = struct.unpack("<4sI", header)
        if name not in _CHUNK_NAMES:
            file.seek(num_bytes + num_bytes % 2, 1)
            continue
        tag = file.read(num_bytes + num_bytes % 2)
        if found := _FRAME.search(tag):
            stop = found.start() + _FRAME_HEADER_BYTES + _from_syncsafe(found[1])
            return tag[found.end() : stop].rstrip(b"\0").decode(errors="replace")  # editors end it with a NUL
    return None


def _to_syncsafe(size: int) -> bytes:
    """Encode a size as in ID3v2.4, seven bits per byte."""
    return bytes((size >> shift) & 0x7F for shift in (21, 14, 7, 0))


def _from_syncsafe(field: bytes) -> int:
    return sum(byte << shift for byte, shift in zip(field, (21, 14, 7, 0), strict=True))
