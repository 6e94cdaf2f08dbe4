"""Reads and writes the list of comments that FLAC, Ogg Vorbis and Opus share. Knows nothing of what lies around it.

Layout: the Vorbis I specification, section 5; all numbers are little-endian, names ASCII in any case, values UTF-8.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

from stable_audio_serve.core.errors import InvalidUploadError

_MOST_COMMENTS = 256


def find_comment(comments: memoryview, name: str) -> memoryview | None:
    """Returns the value of the first comment called `name`, UTF-8, or None. Raises InvalidUploadError."""
    start = f"{name}=".encode()
    _, found, _ = _split(comments)
    return next((comment[len(start) :] for comment in found if _has_name(comment, start)), None)


def with_comment(comments: memoryview, name: str, *, value: bytes) -> bytes:
    """Returns the list with `value` as the last comment and the only one called `name`; the rest stays as it is."""
    start = f"{name}=".encode()
    vendor, found, rest = _split(comments)
    kept = [comment for comment in found if not _has_name(comment, start)]
    return b"".join((_join(vendor, [*kept, start + value]), rest))


def make_comments(name: str, *, value: bytes) -> bytes:
    """Returns a list of one comment, without a vendor."""
    return _join(b"", [f"{name}=".encode() + value])


def _has_name(comment: memoryview, start: bytes) -> bool:
    return bytes(comment[: len(start)]).lower() == start.lower()


def _join(vendor: bytes | memoryview, comments: Iterable[bytes | memoryview]) -> bytes:
    items = list(comments)
    head = (_sized(vendor), struct.pack("<I", len(items)))
    return b"".join((*head, *map(_sized, items)))


def _sized(item: bytes | memoryview) -> bytes:
    return b"".join((struct.pack("<I", len(item)), item))


def _split(comments: memoryview) -> tuple[memoryview, list[memoryview], memoryview]:
    """Returns the vendor, the comments and what follows them."""
    vendor, offset = _read_sized(comments, 0)
    if offset + 4 > len(comments):
        raise _damaged("cut off")
    (count,) = struct.unpack_from("<I", comments, offset)
    if count > _MOST_COMMENTS:
        raise _damaged(f"more than {_MOST_COMMENTS} comments")
    offset += 4
    found = []
    for _ in range(count):
        comment, offset = _read_sized(comments, offset)
        found.append(comment)
    return vendor, found, comments[offset:]


def _read_sized(comments: memoryview, offset: int) -> tuple[memoryview, int]:
    if offset + 4 > len(comments):
        raise _damaged("cut off")
    (size,) = struct.unpack_from("<I", comments, offset)
    stop = offset + 4 + size
    if stop > len(comments):
        raise _damaged("a comment reaches beyond their end")
    return comments[offset + 4 : stop], stop


def _damaged(what: str) -> InvalidUploadError:
    return InvalidUploadError(f"the file's comments are damaged: {what}")
