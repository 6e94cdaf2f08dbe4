"""Embed a recipe (a JSON text) in an audio file, where players ignore it, and read it back.

FLAC, Ogg Vorbis, Opus and MP3 files contain the text as their comment, which libsndfile reads and writes. WAV files
contain it as an ID3v2.4 tag with a TXXX frame, in a chunk after the samples. libsndfile would write a WAV comment
before the samples and cut it off after 4 kB.
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
    """Return a RIFF chunk that contains `text`. Append it to a WAV file at an even offset."""
    content = _UTF8 + _NAME + b"\0" + text.encode()
    frame = b"TXXX" + _to_syncsafe(len(content)) + bytes(2) + content
    tag = b"ID3\x04\0\0" + _to_syncsafe(len(frame)) + frame
    return struct.pack("<4sI", b"id3 ", len(tag)) + tag + bytes(len(tag) % 2)


def extract(file: BinaryIO) -> str | None:
    """Return the text in an audio file, or None if there is no text that begins with "{".

    Another program may have written the text. This function calls libsndfile, so read untrusted files with
    `AudioDecoder.read_text` instead. Raises ValueError if the file is not audio or the text exceeds 1 MiB.
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
            stop = found.start() + _FRAME_HEADER_BYTES + from_syncsafe(found[1])
            return tag[found.end() : stop].rstrip(b"\0").decode(errors="replace")  # some editors append a NUL
    return None


def _to_syncsafe(size: int) -> bytes:
    """Encode a size as ID3v2.4 does, with seven bits per byte."""
    return bytes((size >> shift) & 0x7F for shift in (21, 14, 7, 0))


def from_syncsafe(field: bytes | memoryview) -> int:
    """Decode a size of an ID3v2.4 tag, the inverse of `_to_syncsafe`."""
    return sum(byte << shift for byte, shift in zip(field, (21, 14, 7, 0), strict=True))
