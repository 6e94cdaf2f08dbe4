from __future__ import annotations

import contextlib
import io
import itertools
import json
import struct
import wave
import zlib
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import soundfile
from hypothesis import example, given
from hypothesis import strategies as st

from stable_audio_serve.audio.embedded_text import MOST_TEXT_BYTES, TEXT_NAME, embed, embed_in_file, extract
from stable_audio_serve.audio.encode import AudioFormat, encode_audio
from stable_audio_serve.core.errors import InvalidUploadError
from tests.parameters import some

_TEXT = json.dumps(
    {"prompt": "Regen auf Blech \N{CLOUD WITH RAIN} \N{HIRAGANA LETTER A}", "seed": 7}, ensure_ascii=False
)
_LONG = json.dumps({"windows": list(range(60_000))})  # some 400 kB
_MOST = 1_000_000
_RATE_HZ = 48_000  # a rate of every format: nothing is resampled


def make_noise(*, samples: int, channels: int = 2) -> npt.NDArray[np.float32]:
    return np.random.default_rng(samples).uniform(-0.3, 0.3, (channels, samples)).astype(np.float32)


def make_file(file_format: AudioFormat, *, samples: int = 5_000, channels: int = 2) -> bytes:
    return encode_audio(make_noise(samples=samples, channels=channels), _RATE_HZ, file_format=file_format).to_bytes()


def make_foreign(*, samples: int, channels: int, container: str, subtype: str) -> bytes:
    stream = io.BytesIO()
    audio = make_noise(samples=samples, channels=channels).T
    soundfile.write(stream, audio, _RATE_HZ, format=container, subtype=subtype)
    return stream.getvalue()


def decode(data: bytes) -> npt.NDArray[np.float64]:
    samples, rate_hz = soundfile.read(io.BytesIO(data), always_2d=True)
    assert rate_hz == _RATE_HZ
    return samples


@pytest.mark.parametrize("text", [_TEXT, _LONG, "", "x" * MOST_TEXT_BYTES], ids=["usual", "long", "empty", "longest"])
@pytest.mark.parametrize(("samples", "channels"), some([(1, 1), (1, 2), (4_999, 1), (4_999, 2)], ((1, 1), (4_999, 2))))
@pytest.mark.parametrize("file_format", list(AudioFormat))
def test_the_text_comes_back_and_every_sample_stays(
    file_format: AudioFormat, samples: int, channels: int, text: str
) -> None:
    plain = make_file(file_format, samples=samples, channels=channels)
    told = embed(plain, text=text)
    assert extract(told, most_bytes=MOST_TEXT_BYTES) == text
    np.testing.assert_array_equal(decode(told), decode(plain))
    assert soundfile.info(io.BytesIO(told)).frames == soundfile.info(io.BytesIO(plain)).frames
    assert len(told) - len(plain) < len(text.encode()) * 1.01 + 200


@pytest.mark.parametrize("file_format", list(AudioFormat))
def test_a_plain_file_has_no_text(file_format: AudioFormat) -> None:
    assert extract(make_file(file_format), most_bytes=_MOST) is None


@pytest.mark.parametrize("file_format", list(AudioFormat))
def test_a_second_text_replaces_the_first(file_format: AudioFormat) -> None:
    plain = make_file(file_format)
    told = embed(plain, text=_TEXT)
    assert embed(embed(plain, text=_LONG), text=_TEXT) == embed(told, text=_TEXT) == told == embed(plain, text=_TEXT)


@pytest.mark.parametrize("text", [_TEXT, _LONG], ids=["usual", "long"])
@pytest.mark.parametrize("file_format", list(AudioFormat))
def test_a_finished_file_gets_the_same_bytes(file_format: AudioFormat, text: str) -> None:
    file = encode_audio(make_noise(samples=5_000), _RATE_HZ, file_format=file_format)
    told = embed_in_file(file, text=text)
    assert told.media_type == file.media_type
    assert told.to_bytes() == embed(file.to_bytes(), text=text)


@pytest.mark.parametrize("file_format", [AudioFormat.WAV, AudioFormat.FLAC, AudioFormat.MP3, AudioFormat.OPUS])
def test_a_finished_files_audio_is_not_copied(file_format: AudioFormat) -> None:
    file = encode_audio(make_noise(samples=50_000), _RATE_HZ, file_format=file_format)
    audio = np.frombuffer(file.buffers[-1], dtype=np.uint8)
    told = embed_in_file(file, text=_TEXT)
    assert any(np.shares_memory(audio, np.frombuffer(buffer, dtype=np.uint8)) for buffer in told.buffers)


def test_wav_keeps_its_header_and_where_its_samples_are() -> None:
    plain = make_file(AudioFormat.WAV, samples=999)
    told = embed(plain, text=_TEXT)
    assert told[:4] + told[8 : len(plain)] == plain[:4] + plain[8:]
    assert struct.unpack_from("<I", told, 4) == (len(told) - 8,)
    with wave.open(io.BytesIO(told)) as reader:
        assert reader.readframes(10_000) == plain[44:]


@pytest.mark.parametrize(("samples", "channels"), some(itertools.product((1, 2, 1_001), (1, 2)), ((1, 1), (1_001, 2))))
@pytest.mark.parametrize(
    ("container", "subtype"),
    [("WAV", "PCM_U8"), ("WAV", "PCM_24"), ("WAV", "FLOAT"), ("WAVEX", "PCM_24"), ("FLAC", "PCM_24")],
)
def test_files_of_others_with_more_bits_take_a_text(container: str, subtype: str, channels: int, samples: int) -> None:
    plain = make_foreign(samples=samples, channels=channels, container=container, subtype=subtype)
    told = embed(plain, text=_TEXT)
    assert extract(told, most_bytes=_MOST) == _TEXT
    np.testing.assert_array_equal(decode(told), decode(plain))
    if container == "WAV":
        assert struct.unpack_from("<I", told, 4) == (len(told) - 8,)
        assert len(told) % 2 == 0


@pytest.mark.parametrize("container", ["WAV", "FLAC", "OGG", "MP3"])
def test_what_others_wrote_into_a_file_stays(container: str) -> None:
    stream = io.BytesIO()
    with soundfile.SoundFile(stream, "w", _RATE_HZ, 1, format=container) as file:
        file.title, file.artist = "Rain", "Nobody"
        file.write(make_noise(samples=3_000, channels=1).T)
    plain = stream.getvalue()
    assert extract(plain, most_bytes=_MOST) is None
    told = embed(plain, text=_TEXT)
    assert extract(told, most_bytes=_MOST) == _TEXT
    with soundfile.SoundFile(io.BytesIO(told)) as file:
        assert (file.title, file.artist) == ("Rain", "Nobody")
    np.testing.assert_array_equal(decode(told), decode(plain))


@pytest.mark.parametrize("container", ["AIFF", "CAF", "AU", "RF64", "W64"])
def test_other_files_have_no_text_and_take_none(container: str) -> None:
    data = make_foreign(samples=100, channels=1, container=container, subtype="PCM_16")
    assert extract(data, most_bytes=_MOST) is None
    with pytest.raises(InvalidUploadError, match="not a WAV, FLAC, MP3"):
        embed(data, text=_TEXT)


@pytest.mark.parametrize("text", ["x" * (MOST_TEXT_BYTES + 1), "a\0b", "\ud800"])
def test_a_text_that_no_file_can_hold_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        embed(make_file(AudioFormat.WAV), text=text)


@pytest.mark.parametrize("file_format", list(AudioFormat))
def test_a_text_beyond_the_readers_limit_is_refused(file_format: AudioFormat) -> None:
    told = embed(make_file(file_format), text="\N{CLOUD}" * 100)
    assert extract(told, most_bytes=300) == "\N{CLOUD}" * 100
    with pytest.raises(InvalidUploadError, match="longer than 299 bytes"):
        extract(told, most_bytes=299)


@pytest.mark.parametrize("file_format", list(AudioFormat))
def test_a_text_that_is_not_utf8_is_refused(file_format: AudioFormat) -> None:
    told = embed(make_file(file_format), text="marker").replace(b"marker", b"m\xffrker")
    with pytest.raises(InvalidUploadError):  # in Ogg, the checksum of the page is wrong as well
        extract(told, most_bytes=_MOST)


def ogg_pages(data: bytes) -> list[bytes]:
    pages, start = [], 0
    while start < len(data):
        stop = start + 27 + data[start + 26] + sum(data[start + 27 : start + 27 + data[start + 26]])
        pages.append(data[start:stop])
        start = stop
    return pages


def ogg_checksum(page: bytes) -> int:
    """The definition, bit by bit: RFC 3533, section 6."""
    value = 0
    for byte in page[:22] + bytes(4) + page[26:]:
        value ^= byte << 24
        for _ in range(8):
            value = (value << 1 ^ 0x04C11DB7 if value & 0x80000000 else value << 1) & 0xFFFFFFFF
    return value


@pytest.mark.parametrize("text", [_TEXT, "y" * 130_000], ids=["usual", "long"])
@pytest.mark.parametrize("file_format", [AudioFormat.OGG, AudioFormat.OPUS])
def test_ogg_pages_are_numbered_and_have_their_checksums(file_format: AudioFormat, text: str) -> None:
    plain = make_file(file_format, samples=60_000)
    pages = ogg_pages(embed(plain, text=text))
    assert [struct.unpack_from("<I", page, 18)[0] for page in pages] == list(range(len(pages)))
    assert {struct.unpack_from("<I", page, 14) for page in pages} == {(1,)}
    checked = [*pages[:2], pages[-1]] if len(text) > 1_000 else pages[:3]  # the definition is slow
    assert [struct.unpack_from("<I", page, 22)[0] for page in checked] == [ogg_checksum(page) for page in checked]
    granules = [struct.unpack_from("<q", page, 6)[0] for page in pages]
    expected = [struct.unpack_from("<q", page, 6)[0] for page in ogg_pages(plain)]
    num_more = len(pages) - len(expected)
    assert num_more == (2 if len(text) > 1_000 else 0)
    assert granules == [0, *[-1] * num_more, *expected[1:]]
    assert [page[5] & 1 for page in pages[1 : 2 + num_more]] == [0, *[1] * num_more]


def make_wav(*chunks: tuple[bytes, bytes]) -> bytes:
    body = b"".join(
        name + struct.pack("<I", len(content)) + content + bytes(len(content) % 2) for name, content in chunks
    )
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WAVE" + body


def make_id3(frame: bytes, *, version: int = 4, flags: int = 0) -> bytes:
    size = bytes(len(frame) >> shift & 0x7F for shift in (21, 14, 7, 0))
    return b"ID3" + bytes([version, 0, flags]) + size + frame


def make_txxx(content: bytes, *, flags: int = 0) -> bytes:
    return b"TXXX" + bytes([0, 0, len(content) >> 7, len(content) & 0x7F, 0, flags]) + content


_PACKED = make_txxx(zlib.compress(b"\3" + TEXT_NAME.encode() + b"\0" + bytes(100_000)), flags=8)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("Latin-1", b"\0" + TEXT_NAME.encode() + b"\0caf\xe9"),
        ("UTF-16, Intel", b"\1" + f"\ufeff{TEXT_NAME}\0\ufeffcaf\xe9".encode("utf-16-le")),
        ("UTF-16, Motorola", b"\1" + f"\ufeff{TEXT_NAME}\0\ufeffcaf\xe9\0".encode("utf-16-be")),
        ("UTF-16 without a mark", b"\2" + f"{TEXT_NAME}\0caf\xe9".encode("utf-16-be")),
        ("UTF-8", b"\3" + f"{TEXT_NAME}\0caf\xe9\0".encode()),
    ],
)
def test_tags_that_an_editor_wrote_anew_are_read(name: str, content: bytes) -> None:
    title = b"TIT2\0\0\0\5\0\0\3Rain"
    assert extract(make_id3(title + make_txxx(content) + bytes(100)), most_bytes=5) == "caf\xe9", name
    older = b"TXXX" + struct.pack(">IH", len(content), 0) + content
    assert extract(make_id3(title + older, version=3), most_bytes=5) == "caf\xe9", name
    with pytest.raises(InvalidUploadError):
        extract(make_id3(title + older, version=3), most_bytes=4)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"RIFF", id="four bytes"),
        pytest.param(b"RIFF\4\0\0\0WAVE", id="no chunks"),
        pytest.param(make_wav((b"id3 ", make_id3(_PACKED))), id="packed frame"),
        pytest.param(make_id3(_PACKED), id="packed frame of an MP3"),
        pytest.param(make_id3(_PACKED, version=2), id="ID3v2.2"),
        pytest.param(make_id3(_PACKED, flags=0x80), id="unsynchronised"),
        pytest.param(make_id3(bytes(1_000)), id="only padding"),
        pytest.param(make_id3(make_txxx(b"")), id="empty frame"),
        pytest.param(make_id3(make_txxx(b"\x09" + TEXT_NAME.encode() + b"\0x")), id="unknown encoding"),
    ],
)
def test_nothing_is_found_where_there_is_nothing(data: bytes) -> None:
    assert extract(data, most_bytes=_MOST) is None


def make_flac(*blocks: tuple[int, bytes]) -> bytes:
    return b"fLaC" + b"".join(bytes([kind]) + len(content).to_bytes(3, "big") + content for kind, content in blocks)


def with_page(data: bytes, index: int, change: Callable[[bytes], bytes]) -> bytes:
    pages = ogg_pages(data)
    pages[index] = change(pages[index])
    return b"".join(pages)


_OGG = make_file(AudioFormat.OGG)
_FLAC_HEAD = (0, bytes(34))
_COUNT = struct.pack("<I", 0xFFFFFFFF)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        pytest.param(make_wav((b"data", bytes(100)))[:-1], "shorter than it says", id="WAV cut off"),
        pytest.param(b"RIFF\x0c\0\0\0WAVEdata\x02\0\0\0", "beyond its end", id="WAV chunk too long"),
        pytest.param(b"RIFF\x08\0\0\0WAVEdata", "beyond its end", id="WAV chunk header cut off"),
        pytest.param(b"RIFF\xff\xff\xff\xffWAVEdata\xff\xff\xff\xff", "shorter than it says", id="WAV of a pipe"),
        pytest.param(make_wav(*[(b"junk", b"")] * 10_000), "more than 256 chunks", id="WAV of 10,000 chunks"),
        pytest.param(make_wav((b"id3 ", b"ID3")), "cut off", id="WAV with half a tag"),
        pytest.param(make_wav((b"id3 ", make_id3(b"")[:9] + b"\1")), "beyond the file", id="tag larger than its chunk"),
        pytest.param(b"ID3\4\0\0\x7f\x7f\x7f\x7f" + bytes(100), "beyond the file", id="tag too long"),
        pytest.param(b"ID3\4\0\0\x80\0\0\0", "a size in it is none", id="tag size of eight bits"),
        pytest.param(make_id3(b"TXXX\0\0\1\0\0\0"), "a frame reaches beyond", id="frame too long"),
        pytest.param(make_id3(b"TIT2\0\0\0\0\0\0" * 10_000), "more than 256 frames", id="10,000 frames"),
        pytest.param(
            make_id3(make_txxx(b"\1\xff\xfe" + f"{TEXT_NAME}\0x".encode("utf-16-le") + b"x")), "not utf-16", id="odd"
        ),
        pytest.param(b"fLaC", "beyond its end", id="FLAC without blocks"),
        pytest.param(make_flac(_FLAC_HEAD, (1, b""))[:-3], "beyond its end", id="FLAC block header cut off"),
        pytest.param(make_flac(*[(1, b"")] * 10_000), "more than 256 blocks", id="FLAC of 10,000 blocks"),
        pytest.param(make_flac((0x84, bytes(3))), "cut off", id="no vendor"),
        pytest.param(make_flac((0x84, _COUNT)), "beyond their end", id="vendor too long"),
        pytest.param(make_flac((0x84, bytes(4) + _COUNT)), "more than 256 comments", id="many comments"),
        pytest.param(make_flac((0x84, bytes(4) + b"\1\0\0\0" + _COUNT)), "beyond their end", id="comment too long"),
        pytest.param(_OGG[:100], "beyond its end", id="Ogg cut off in a page"),
        pytest.param(ogg_pages(_OGG)[0], "cut off", id="Ogg of one page"),
        pytest.param(ogg_pages(_OGG)[0] * 10_000, "out of order", id="the same Ogg page again and again"),
        pytest.param(with_page(_OGG, 1, lambda page: page[:50] + b"\0" + page[51:]), "checksum", id="Ogg byte changed"),
        pytest.param(with_page(_OGG, 1, lambda page: page[:5] + b"\1" + page[6:]), "order", id="Ogg page continued"),
        pytest.param(_OGG[:58] + b"Oggs" + _OGG[62:], "where it should", id="no second Ogg page"),
    ],
)
def test_damaged_files_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(InvalidUploadError, match=message):
        extract(data, most_bytes=_MOST)


@pytest.mark.parametrize("file_format", list(AudioFormat))
def test_a_file_cut_off_anywhere_before_its_text_ends_is_refused_or_has_none(file_format: AudioFormat) -> None:
    told = embed(make_file(file_format, samples=600, channels=1), text=_TEXT)
    for stop in range(0, len(told), 7):
        try:
            assert extract(told[:stop], most_bytes=_MOST) in {None, _TEXT}
        except InvalidUploadError:
            continue


_TOLD = [embed(make_file(file_format, samples=300, channels=1), text=_TEXT) for file_format in AudioFormat]
_edit = st.tuples(st.integers(0, 1_500), st.integers(0, 8), st.binary(max_size=8))


@given(st.sampled_from(_TOLD), st.lists(_edit, min_size=1, max_size=6))
@example(_TOLD[0], [(4, 4, b"\xff\xff\xff\x7f")])
def test_changed_files_are_read_or_refused_by_name(data: bytes, edits: list[tuple[int, int, bytes]]) -> None:
    for start, num_removed, inserted in edits:
        data = data[:start] + inserted + data[start + num_removed :]
    try:
        found = extract(data, most_bytes=_MOST)
        assert found is None or len(found.encode()) <= len(data) * 2
        if found is not None:
            assert extract(embed(data, text="new"), most_bytes=3) == "new"
    except InvalidUploadError:
        pass


_OPUS = embed(make_file(AudioFormat.OPUS, samples=300, channels=1), text=_TEXT)


@given(st.lists(st.tuples(st.integers(0, 150), st.integers(0, 255)), min_size=1, max_size=4))
def test_changed_comments_under_a_right_checksum_are_read_or_refused_by_name(edits: list[tuple[int, int]]) -> None:
    def change(page: bytes) -> bytes:
        payload = 27 + page[26]
        changed = bytearray(page)
        for offset, value in edits:
            changed[payload + offset] = value
        changed[22:26] = struct.pack("<I", ogg_checksum(bytes(changed)))
        return bytes(changed)

    data = with_page(_OPUS, 1, change)
    with contextlib.suppress(InvalidUploadError):
        found = extract(data, most_bytes=_MOST)
        assert found is None or extract(embed(data, text="new"), most_bytes=3) == "new"


@given(st.sampled_from([b"RIFF\x40\0\0\0WAVEid3 ", b"ID3\4\0\0\0\0\0\x40TXXX", b"fLaC", b"OggS\0\2", b""]), st.binary())
def test_any_bytes_are_read_or_refused_by_name(head: bytes, rest: bytes) -> None:
    for action in (lambda data: extract(data, most_bytes=100), lambda data: embed(data, text=_TEXT)):
        with contextlib.suppress(InvalidUploadError):
            action(head + rest)
