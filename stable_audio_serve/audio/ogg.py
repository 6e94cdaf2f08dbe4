"""Reads and writes the pages of Ogg files: repairs what libsndfile writes, and exchanges the header packets.

Page layout and checksum: RFC 3533. The end trimming of Opus: RFC 7845, section 4.4. Knows nothing of what packets hold.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from stable_audio_serve.core.errors import InvalidUploadError

_SERIAL = 1
_HEADER_BYTES = 27
_CONTINUED = 1  # the page begins with the rest of a packet
_NO_PACKET_ENDS = -1  # the granule position of such a page
_MOST_SEGMENTS = 255
_MOST_HEADER_PAGES = 4_000  # 260 MB of full pages; smaller ones are a way to keep a reader busy
_REVERSED_BITS = bytes(int(f"{value:08b}"[::-1], 2) for value in range(256))


class HeaderPackets(NamedTuple):
    """The packets before the audio, and where their pages lie. The first packet has a page of its own."""

    packets: list[bytes]
    serial: int
    first_page_stop: int
    stop: int
    num_pages: int


class _Page(NamedTuple):
    start: int
    payload_start: int
    stop: int
    is_continued: bool
    serial: int
    sequence: int


def rewrite_ogg(data: bytearray, *, trim_samples: int = 0) -> None:
    """Give every page of the one logical stream in `data` the same serial and cut `trim_samples` from its end.

    libsndfile takes a random serial, and its end is exact only behind samples that are cut off again.
    """
    for page in _pages(data, 0):
        struct.pack_into("<I", data, page.start + 14, _SERIAL)
        if page.stop == len(data) and trim_samples:
            (granule,) = struct.unpack_from("<q", data, page.start + 6)
            struct.pack_into("<q", data, page.start + 6, granule - trim_samples)
        _seal(data, page.start, stop=page.stop)


def read_header_packets(data: memoryview, *, num_packets: int) -> HeaderPackets:
    """Returns the first `num_packets` packets of the stream in `data`, which must end with a page.

    Raises InvalidUploadError when the pages are cut off, damaged, out of order or of several streams.
    """
    packets: list[bytes] = []
    parts: list[memoryview] = []
    first: _Page | None = None
    for number, page in enumerate(_pages(data, 0)):
        first = first or page
        if number >= _MOST_HEADER_PAGES:
            raise _damaged("its headers have too many pages")
        if (page.serial, page.sequence) != (first.serial, number) or page.is_continued != bool(parts):
            raise _damaged("the pages of its headers are out of order")
        if _checksum_of(data[page.start : page.stop]) != data[page.start + 22 : page.start + 26]:
            raise _damaged("the checksum of a header page is wrong")
        offset = page.payload_start
        for size in data[page.start + _HEADER_BYTES : page.payload_start]:
            parts.append(data[offset : offset + size])
            offset += size
            if size < _MOST_SEGMENTS:
                packets.append(b"".join(parts))
                parts.clear()
        if len(packets) >= num_packets:
            break
    if first is None or len(packets) != num_packets or parts:
        raise _damaged("its headers are cut off or run into the audio")
    return HeaderPackets(packets, first.serial, first.stop, page.stop, number + 1)


def exchange_header_packets(
    data: memoryview, headers: HeaderPackets, *, packets: list[bytes]
) -> list[bytes | memoryview]:
    """Returns the parts of `data` with `packets` in place of all its header packets but the first.

    The pages of the audio are copied only when their numbers change.
    """
    pages = list(_make_pages(packets, serial=headers.serial, first_sequence=1))
    rest: bytes | memoryview = data[headers.stop :]
    shift = 1 + len(pages) - headers.num_pages
    if shift:
        renumbered = bytearray(rest)
        for page in _pages(renumbered, 0):
            struct.pack_into("<I", renumbered, page.start + 18, (page.sequence + shift) & 0xFFFFFFFF)
            _seal(renumbered, page.start, stop=page.stop)
        rest = memoryview(renumbered)
    return [data[: headers.first_page_stop], *pages, rest]


def _pages(data: bytearray | memoryview, start: int) -> Iterator[_Page]:
    while start < len(data):
        payload_start = start + _HEADER_BYTES
        if payload_start > len(data) or bytes(data[start : start + 5]) != b"OggS\0":
            raise _damaged("a page is cut off or does not begin where it should")
        payload_start += data[start + 26]
        stop = payload_start + sum(data[start + _HEADER_BYTES : payload_start])
        if stop > len(data):
            raise _damaged("a page reaches beyond its end")
        serial, sequence = struct.unpack_from("<II", data, start + 14)
        yield _Page(start, payload_start, stop, bool(data[start + 5] & _CONTINUED), serial, sequence)
        start = stop


def _make_pages(packets: list[bytes], *, serial: int, first_sequence: int) -> Iterator[bytes]:
    lacing = b"".join(b"\xff" * (len(packet) // 255) + bytes([len(packet) % 255]) for packet in packets)
    payload = memoryview(b"".join(packets))
    is_continued = False
    for number, start in enumerate(range(0, len(lacing), _MOST_SEGMENTS)):
        segments = lacing[start : start + _MOST_SEGMENTS]
        granule = 0 if min(segments) < 255 else _NO_PACKET_ENDS
        flags = _CONTINUED if is_continued else 0
        identity = (granule, serial, first_sequence + number)
        header = struct.pack("<4sBBqIIIB", b"OggS", 0, flags, *identity, 0, len(segments))
        page = bytearray(b"".join((header, segments, payload[: sum(segments)])))
        _seal(page, 0, stop=len(page))
        yield bytes(page)
        payload = payload[sum(segments) :]
        is_continued = segments[-1] == 255


def _seal(data: bytearray, start: int, *, stop: int) -> None:
    data[start + 22 : start + 26] = _checksum_of(memoryview(data)[start:stop])


def _checksum_of(page: memoryview) -> bytes:
    # Ogg's CRC is zlib's with the bits of every byte and of the result reversed, and without its two inversions.
    content = b"".join((page[:22], bytes(4), page[26:]))
    value = zlib.crc32(content.translate(_REVERSED_BITS), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return value.to_bytes(4, "big").translate(_REVERSED_BITS)


def _damaged(what: str) -> InvalidUploadError:
    return InvalidUploadError(f"the Ogg file is damaged: {what}")
