"""Repairs Ogg files written by libsndfile: one fixed stream serial instead of a random one, and an exact end.

Page layout: RFC 3533. The end trimming of Opus: RFC 7845, section 4.4.
"""

from __future__ import annotations

import struct
import zlib

_SERIAL = 1
_HEADER_BYTES = 27
_REVERSED_BITS = bytes(int(f"{value:08b}"[::-1], 2) for value in range(256))


def rewrite_ogg(data: bytearray, *, trim_samples: int = 0) -> None:
    """Give every page of the one logical stream in `data` the same serial and cut `trim_samples` from its end."""
    start = 0
    while start < len(data):
        num_segments = data[start + 26]
        payload = sum(data[start + _HEADER_BYTES : start + _HEADER_BYTES + num_segments])
        stop = start + _HEADER_BYTES + num_segments + payload
        struct.pack_into("<I", data, start + 14, _SERIAL)
        if stop == len(data) and trim_samples:
            (granule,) = struct.unpack_from("<q", data, start + 6)
            struct.pack_into("<q", data, start + 6, granule - trim_samples)
        struct.pack_into("<I", data, start + 22, 0)
        struct.pack_into("<I", data, start + 22, _checksum(bytes(data[start:stop])))
        start = stop


def _checksum(page: bytes) -> int:
    # Ogg's CRC is zlib's with the bits of every byte and of the result reversed, and without its two inversions.
    value = zlib.crc32(page.translate(_REVERSED_BITS), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int.from_bytes(value.to_bytes(4, "little").translate(_REVERSED_BITS), "big")
