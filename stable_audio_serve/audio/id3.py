"""Writes one named text into an ID3v2 tag and finds it again. Knows nothing of what lies around the tag.

Written is ID3v2.4 (id3.org, "ID3 tag version 2.4.0"): a TXXX frame in UTF-8, which has no byte that looks like MPEG
audio. Version 2.3 is read too, because editors turn tags into it. Nothing compressed is ever unpacked.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from stable_audio_serve.core.errors import InvalidUploadError

_HEADER_BYTES = 10
_FRAME_HEADER_BYTES = 10
_FOOTER = 0x10
_UNSYNCHRONISED_OR_EXTENDED = 0xC0
_MOST_FRAMES = 256
_TEXT_FRAME = b"TXXX"
_CODECS = {0: "latin-1", 1: "utf-16", 2: "utf-16-be", 3: "utf-8"}
_UTF8 = 3


class _Tag(NamedTuple):
    version: int
    flags: int
    stop: int


class _Frame(NamedTuple):
    name: bytes
    flags: int
    start: int
    content: memoryview


def make_tag(name: str, *, value: bytes, other_frames: bytes = b"") -> bytes:
    """Returns a tag with the UTF-8 text `value` called `name` behind `other_frames`."""
    content = b"".join((bytes([_UTF8]), name.encode(), b"\0", value))
    frame = (_TEXT_FRAME, _syncsafe(len(content)), bytes(2), content)
    size = len(other_frames) + _FRAME_HEADER_BYTES + len(content)
    return b"".join((b"ID3\x04\0\0", _syncsafe(size), other_frames, *frame))


def tag_stop(data: memoryview) -> int:
    """Returns where the tag at the start of `data` ends, 0 when there is none. Raises InvalidUploadError."""
    return _read_tag(data).stop if bytes(data[:3]) == b"ID3" else 0


def other_frames(data: memoryview, name: str) -> bytes:
    """Returns the frames of the tag at the start of `data` without the text called `name`.

    Raises InvalidUploadError when it is damaged or of a kind that is not written here.
    """
    tag = _read_tag(data)
    if tag.version != 4 or tag.flags:
        raise InvalidUploadError("the ID3 tag of the file is of a kind that cannot be changed")
    kept = [frame for frame in _frames(data, tag) if _value(frame, name) is None]
    return b"".join(data[frame.start : frame.start + _FRAME_HEADER_BYTES + len(frame.content)] for frame in kept)


def find_text(data: memoryview, name: str, *, most_bytes: int) -> str | None:
    """Returns the text called `name` of the tag at the start of `data`, or None.

    A tag of version 2.2, with an extended header or unsynchronised counts as one without it: nobody made it from ours.
    Raises InvalidUploadError when the tag is damaged, or the text longer than `most_bytes` in UTF-8.
    """
    tag = _read_tag(data)
    if tag.version not in {3, 4} or tag.flags & _UNSYNCHRONISED_OR_EXTENDED:
        return None
    for frame in _frames(data, tag):
        found = _value(frame, name)
        if found is not None:
            return _decode(*found, most_bytes=most_bytes)
    return None


def _read_tag(data: memoryview) -> _Tag:
    if len(data) < _HEADER_BYTES or bytes(data[:3]) != b"ID3":
        raise _damaged("its header is cut off")
    version, flags = data[3], data[5]
    stop = _HEADER_BYTES + _parse_syncsafe(data[6:10])
    if version == 4 and flags & _FOOTER:
        stop += _HEADER_BYTES
    if stop > len(data):
        raise _damaged("it reaches beyond the file")
    return _Tag(version, flags, stop)


def _frames(data: memoryview, tag: _Tag) -> Iterator[_Frame]:
    start = _HEADER_BYTES
    end = tag.stop - (_HEADER_BYTES if tag.version == 4 and tag.flags & _FOOTER else 0)
    for _ in range(_MOST_FRAMES):
        content_start = start + _FRAME_HEADER_BYTES
        if content_start > end or not data[start]:  # the rest is padding
            return
        size_field = data[start + 4 : start + 8]
        size = _parse_syncsafe(size_field) if tag.version == 4 else int.from_bytes(size_field, "big")
        if content_start + size > end:
            raise _damaged("a frame reaches beyond it")
        content = data[content_start : content_start + size]
        yield _Frame(bytes(data[start : start + 4]), data[start + 9], start, content)
        start = content_start + size
    raise _damaged(f"it has more than {_MOST_FRAMES} frames")


def _value(frame: _Frame, name: str) -> tuple[memoryview, str] | None:
    """Returns the value and its codec where the frame is the text called `name` and neither packed nor encrypted."""
    if frame.name != _TEXT_FRAME or frame.flags or not len(frame.content):
        return None
    codec = _CODECS.get(frame.content[0], "")
    for actual in ("utf-16-le", "utf-16-be") if codec == "utf-16" else (codec,):
        if not actual:
            return None
        mark = "\ufeff" if codec == "utf-16" else ""
        start = f"{mark}{name}\0".encode(actual)
        if frame.content[1 : 1 + len(start)] == start:
            return frame.content[1 + len(start) :], actual
    return None


def _decode(value: memoryview, codec: str, *, most_bytes: int) -> str:
    too_long = InvalidUploadError(f"the text in the file is longer than {most_bytes} bytes")
    if len(value) > 2 * most_bytes + 4:  # UTF-16 takes at most twice as much as UTF-8, and two marks
        raise too_long
    try:
        text = str(value, codec).removeprefix("\ufeff").partition("\0")[0]
        num_bytes = len(text.encode())
    except UnicodeError as error:
        raise _damaged(f"its text is not {codec}") from error
    if num_bytes > most_bytes:
        raise too_long
    return text


def _syncsafe(size: int) -> bytes:
    """Returns `size` with seven bits a byte."""
    return bytes((size >> shift) & 0x7F for shift in (21, 14, 7, 0))


def _parse_syncsafe(field: memoryview) -> int:
    if max(field) > 0x7F:
        raise _damaged("a size in it is none")
    first, second, third, last = field
    return first << 21 | second << 14 | third << 7 | last


def _damaged(what: str) -> InvalidUploadError:
    return InvalidUploadError(f"the ID3 tag of the file is damaged: {what}")
