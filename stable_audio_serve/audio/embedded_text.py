"""Puts a text into an encoded audio file, where players ignore it, and reads it out of files of unknown origin.

| format | place |
|---|---|
| WAV | a chunk `id3 ` behind the samples: an ID3v2.4 tag with the frame TXXX |
| MP3 | the same tag in front of the first MPEG frame, which says the exact length |
| FLAC | a comment in its VORBIS_COMMENT block |
| Ogg Vorbis, Opus | a comment in the second header packet |

The name is the same everywhere. The encoded audio is never touched, so every sample stays as it is. libsndfile's own
text fields do not suffice: it writes them in front of WAV's samples, cannot name them, and reads only short ones.
Libraries that write all these formats are under the GPL. Knows nothing of what the text says.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from stable_audio_serve.audio.encode import EncodedFile
from stable_audio_serve.audio.id3 import find_text, make_tag, other_frames, tag_stop
from stable_audio_serve.audio.ogg import HeaderPackets, exchange_header_packets, read_header_packets
from stable_audio_serve.audio.vorbis_comments import find_comment, make_comments, with_comment
from stable_audio_serve.core.errors import InvalidUploadError

TEXT_NAME = "STABLE_AUDIO_RECIPE"
MOST_TEXT_BYTES = 1_048_576

_WAV_MOST_BYTES = 0xFFFF_FFFF
_WAV_MOST_CHUNKS = 256
_WAV_TAG = b"id3 "
_WAV_TAGS = {_WAV_TAG, b"ID3 "}  # some editors write the second
_FLAC_MOST_BLOCKS = 256
_FLAC_MOST_BLOCK_BYTES = 0xFF_FFFF
_FLAC_COMMENTS = 4
_FLAC_LAST = 0x80
_OGG_STREAMS = {b"\x01vorbis": (b"\x03vorbis", 3), b"OpusHead": (b"OpusTags", 2)}


class _Chunk(NamedTuple):
    name: bytes
    start: int
    content_start: int
    stop: int


class _Block(NamedTuple):
    kind: int
    content: bytes | memoryview


class _OggHeaders(NamedTuple):
    pages: HeaderPackets
    comments_magic: bytes

    @property
    def comments(self) -> memoryview:
        return memoryview(self.pages.packets[1])[len(self.comments_magic) :]


def embed(encoded: bytes, *, text: str) -> bytes:
    """Returns the WAV, FLAC, MP3, Ogg Vorbis or Opus file `encoded` with `text` in it, in place of an earlier one.

    Raises ValueError for a text of more than 1 MiB in UTF-8 or with a NUL, InvalidUploadError for another file.
    """
    return b"".join(_embed(memoryview(encoded), _to_utf8(text)))


def embed_in_file(file: EncodedFile, *, text: str) -> EncodedFile:
    """Returns `file` with `text` in it, as `embed` does, but copies none of WAV's, FLAC's and MP3's audio."""
    head, *rest = file.buffers
    value = _to_utf8(text)
    if not rest:
        return EncodedFile(file.media_type, tuple(_embed(memoryview(head), value)))
    if bytes(head[:4]) != b"RIFF":
        raise ValueError("only WAV files come in several buffers")
    return EncodedFile(file.media_type, tuple(_close_wav([head, *rest], make_tag(TEXT_NAME, value=value))))


def extract(encoded: bytes | memoryview, *, most_bytes: int) -> str | None:
    """Returns the text in the file `encoded`, which may be hostile, or None when there is none.

    Takes linear time and no more memory than a few times the file. Raises InvalidUploadError when the file is damaged
    where a text may be, or when the text is longer than `most_bytes` in UTF-8.
    """
    data = memoryview(encoded)
    value: memoryview | None = None
    match _format_of(data):
        case "wav":
            tags = (data[chunk.content_start : chunk.stop] for chunk in _wav_chunks(data) if chunk.name in _WAV_TAGS)
            texts = (find_text(tag, TEXT_NAME, most_bytes=most_bytes) for tag in tags)
            return next((text for text in texts if text is not None), None)
        case "mp3" if tag_stop(data):
            return find_text(data, TEXT_NAME, most_bytes=most_bytes)
        case "flac":
            blocks, _ = _read_flac(data)
            lists = (memoryview(block.content) for block in blocks if block.kind == _FLAC_COMMENTS)
            values = (find_comment(comments, TEXT_NAME) for comments in lists)
            value = next((found for found in values if found is not None), None)
        case "ogg" if (headers := _read_ogg(data)) is not None:
            value = find_comment(headers.comments, TEXT_NAME)
    return None if value is None else _from_utf8(value, most_bytes=most_bytes)


def _to_utf8(text: str) -> bytes:
    value = text.encode()
    if len(value) > MOST_TEXT_BYTES or b"\0" in value:
        raise ValueError(f"a text in a file has at most {MOST_TEXT_BYTES} bytes and no NUL")
    return value


def _from_utf8(value: memoryview, *, most_bytes: int) -> str:
    if len(value) > most_bytes:
        raise InvalidUploadError(f"the text in the file is longer than {most_bytes} bytes")
    try:
        return str(value, "utf-8")
    except UnicodeDecodeError as error:
        raise InvalidUploadError("the text in the file is not UTF-8") from error


def _embed(data: memoryview, value: bytes) -> list[bytes | memoryview]:
    match _format_of(data):
        case "wav":
            return _embed_in_wav(data, value)
        case "mp3":
            stop = tag_stop(data)
            others = other_frames(data, TEXT_NAME) if stop else b""
            return [make_tag(TEXT_NAME, value=value, other_frames=others), data[stop:]]
        case "flac":
            return _embed_in_flac(data, value)
        case "ogg" if (headers := _read_ogg(data)) is not None:
            comments = headers.comments_magic + with_comment(headers.comments, TEXT_NAME, value=value)
            packets = [comments, *headers.pages.packets[2:]]
            return exchange_header_packets(data, headers.pages, packets=packets)
    raise InvalidUploadError("not a WAV, FLAC, MP3, Ogg Vorbis or Opus file")


def _format_of(data: memoryview) -> str | None:
    head = bytes(data[:12])
    if head[:4] == b"RIFF" and head[8:] == b"WAVE":
        return "wav"
    if head[:3] == b"ID3" or (len(head) > 1 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0):
        return "mp3"
    return {b"fLaC": "flac", b"OggS": "ogg"}.get(head[:4])


def _wav_chunks(data: memoryview) -> Iterator[_Chunk]:
    end = 8 + struct.unpack_from("<I", data, 4)[0]
    if end > len(data):
        raise _damaged("WAV", "it is shorter than it says")
    start = 12
    for _ in range(_WAV_MOST_CHUNKS):
        if start >= end:
            return
        content_start = start + 8
        stop = content_start + (struct.unpack_from("<I", data, start + 4)[0] if content_start <= end else 0)
        if stop > end:
            raise _damaged("WAV", "a chunk reaches beyond its end")
        yield _Chunk(bytes(data[start : start + 4]), start, content_start, stop)
        start = stop + stop % 2
    raise _damaged("WAV", f"it has more than {_WAV_MOST_CHUNKS} chunks")


def _embed_in_wav(data: memoryview, value: bytes) -> list[bytes | memoryview]:
    kept: list[bytes | memoryview] = [data[:12]]
    others = []
    for chunk in _wav_chunks(data):
        if chunk.name in _WAV_TAGS:
            others.append(other_frames(data[chunk.content_start : chunk.stop], TEXT_NAME))
        else:
            kept += [data[chunk.start : chunk.stop], bytes(chunk.stop % 2)]
    return _close_wav(kept, make_tag(TEXT_NAME, value=value, other_frames=b"".join(others)))


def _close_wav(parts: list[bytes | memoryview], tag: bytes) -> list[bytes | memoryview]:
    """Returns the file of `parts`, the first of which has the RIFF size, with a chunk of `tag` behind them."""
    num_bytes = sum(map(len, parts))
    chunk = b"".join((bytes(num_bytes % 2), _WAV_TAG, struct.pack("<I", len(tag)), tag, bytes(len(tag) % 2)))
    size = num_bytes + len(chunk) - 8
    if size > _WAV_MOST_BYTES:
        raise InvalidUploadError("the WAV file is too large to hold a text as well")
    head, *rest = parts
    return [b"".join((head[:4], struct.pack("<I", size), head[8:])), *rest, chunk]


def _read_flac(data: memoryview) -> tuple[list[_Block], int]:
    """Returns the metadata blocks and where the audio begins."""
    blocks: list[_Block] = []
    start = 4
    is_last = False
    while not is_last:
        if len(blocks) >= _FLAC_MOST_BLOCKS:
            raise _damaged("FLAC", f"it has more than {_FLAC_MOST_BLOCKS} blocks in front of the audio")
        content_start = start + 4
        stop = content_start + int.from_bytes(data[start + 1 : content_start], "big")
        if content_start > len(data) or stop > len(data):
            raise _damaged("FLAC", "a block reaches beyond its end")
        is_last = bool(data[start] & _FLAC_LAST)
        blocks.append(_Block(data[start] & ~_FLAC_LAST, data[content_start:stop]))
        start = stop
    return blocks, start


def _embed_in_flac(data: memoryview, value: bytes) -> list[bytes | memoryview]:
    blocks, audio_start = _read_flac(data)
    index = next((index for index, block in enumerate(blocks) if block.kind == _FLAC_COMMENTS), None)
    if index is None:
        blocks.insert(1, _Block(_FLAC_COMMENTS, make_comments(TEXT_NAME, value=value)))  # the first is STREAMINFO
    else:
        comments = with_comment(memoryview(blocks[index].content), TEXT_NAME, value=value)
        blocks[index] = _Block(_FLAC_COMMENTS, comments)
    parts: list[bytes | memoryview] = [b"fLaC"]
    for number, (kind, content) in enumerate(blocks, start=1):
        if len(content) > _FLAC_MOST_BLOCK_BYTES:
            raise InvalidUploadError("the FLAC file has too many comments to hold a text as well")
        last = _FLAC_LAST if number == len(blocks) else 0
        parts += [bytes([kind | last]) + len(content).to_bytes(3, "big"), content]
    return [*parts, data[audio_start:]]


def _read_ogg(data: memoryview) -> _OggHeaders | None:
    """Returns the header packets, None for other streams than Vorbis and Opus."""
    first = bytes(data[28 : 28 + 8])  # one segment is enough for either first packet
    for magic, (comments_magic, num_packets) in _OGG_STREAMS.items():
        if first.startswith(magic):
            headers = read_header_packets(data, num_packets=num_packets)
            if not headers.packets[1].startswith(comments_magic):
                raise _damaged("Ogg", "its comments are not where they should be")
            return _OggHeaders(headers, comments_magic)
    return None


def _damaged(container: str, what: str) -> InvalidUploadError:
    return InvalidUploadError(f"the {container} file is damaged: {what}")
