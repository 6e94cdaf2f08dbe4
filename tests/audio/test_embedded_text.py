from __future__ import annotations

import io
import struct
import wave
from contextlib import suppress
from itertools import product

import numpy as np
import numpy.typing as npt
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from stable_audio_serve.audio.embedded_text import MOST_TEXT_BYTES, extract
from stable_audio_serve.audio.encode import MOST_OPUS_TEXT_CHARS, encode_audio
from stable_audio_serve.audio.finish import ClipOrigin, FileOrder, finish
from stable_audio_serve.audio.formats import TEXT_FORMATS
from stable_audio_serve.core.generation import GenerationRequest, GenerationResult
from stable_audio_serve.core.sound import AudioFormat, Encoding
from tests.parameters import some

_TEXT = r'{"prompt":"Regen auf Blech \ud83c\udf27 =","seed":7}'
_RATE_HZ = 48_000  # every format supports this rate, so nothing is resampled
_MOST = dict.fromkeys(AudioFormat, MOST_TEXT_BYTES) | {AudioFormat.OPUS: MOST_OPUS_TEXT_CHARS}


def make_noise(*, samples: int, channels: int = 2) -> npt.NDArray[np.float32]:
    return np.random.default_rng(samples).uniform(-0.3, 0.3, (channels, samples)).astype(np.float32)


def make_file(file_format: AudioFormat, *, text: str | None, samples: int = 5_000, channels: int = 2) -> bytes:
    audio = make_noise(samples=samples, channels=channels)
    return encode_audio(audio, _RATE_HZ, encoding=Encoding(file_format), text=text).to_bytes()


def found_in(data: bytes) -> str | None:
    return extract(io.BytesIO(data))


def comment_of(data: bytes) -> str:
    with soundfile.SoundFile(io.BytesIO(data)) as file:
        return str(file.comment)


def make_long(num_chars: int) -> str:
    return '{"' + "x" * (num_chars - 4) + '"}'


@pytest.mark.parametrize("num_chars", [None, 4_096, 20_000, "most"])
@pytest.mark.parametrize(("samples", "channels"), some([(1, 1), (1, 2), (4_999, 1), (4_999, 2)], ((1, 1), (4_999, 2))))
@pytest.mark.parametrize("file_format", TEXT_FORMATS)
def test_text_is_read_back_and_samples_are_unchanged(
    file_format: AudioFormat, samples: int, channels: int, num_chars: int | str | None
) -> None:
    most = _MOST[file_format]
    text = _TEXT if num_chars is None else make_long(most if isinstance(num_chars, str) else num_chars)
    plain = make_file(file_format, text=None, samples=samples, channels=channels)
    tagged = make_file(file_format, text=text, samples=samples, channels=channels)
    assert found_in(tagged) == text
    assert found_in(plain) is None
    if file_format is not AudioFormat.WAV:
        assert comment_of(tagged) == text
    before, after = (soundfile.read(io.BytesIO(data), always_2d=True) for data in (plain, tagged))
    np.testing.assert_array_equal(after[0], before[0])
    assert after[1] == before[1] == _RATE_HZ


@pytest.mark.parametrize("text", [_TEXT, _TEXT + " "], ids=["even", "odd"])
@pytest.mark.parametrize(("samples", "channels"), list(product((1, 999), (1, 2))))
def test_wav_has_the_text_after_the_samples(samples: int, channels: int, text: str) -> None:
    plain, tagged = (make_file(AudioFormat.WAV, text=t, samples=samples, channels=channels) for t in (None, text))
    assert tagged[:4] + tagged[8 : len(plain)] == plain[:4] + plain[8:]
    assert struct.unpack_from("<I", tagged, 4) == (len(tagged) - 8,)
    assert len(tagged) % 2 == 0
    with wave.open(io.BytesIO(tagged)) as reader:
        assert reader.readframes(10_000) == plain[44:]
    name, num_bytes = struct.unpack_from("<4sI", tagged, len(plain))
    tag = tagged[len(plain) + 8 :][:num_bytes]
    value = b"\3STABLE_AUDIO_RECIPE\0" + text.encode()
    frame = b"TXXX" + bytes([0, 0, len(value) >> 7, len(value) & 0x7F, 0, 0]) + value
    assert (name, tag) == (b"id3 ", b"ID3\4\0\0" + bytes([0, 0, len(frame) >> 7, len(frame) & 0x7F]) + frame)


def test_a_tag_rewritten_by_an_editor_is_read() -> None:
    """The tag has what the editor Mutagen adds: other frames, a NUL after each text, and padding at the end."""
    title = b"TIT2\0\0\0\5\0\0\3Rain"
    value = b"\3STABLE_AUDIO_RECIPE\0" + _TEXT.encode() + b"\0"
    frame = b"TXXX\0\0\0" + bytes([len(value), 0, 0]) + value
    tag = b"ID3\4\0\0" + bytes(4) + title + frame + title + bytes(100)
    for name in (b"id3 ", b"ID3 "):
        chunks = b"cue \3\0\0\0abc\0" + name + struct.pack("<I", len(tag)) + tag
        assert found_in(make_file(AudioFormat.WAV, text=None, samples=9) + chunks) == _TEXT


@pytest.mark.parametrize("text", ["made by hand", "[1]", ""])
@pytest.mark.parametrize("container", ["WAV", "FLAC", "OGG", "MP3", "AIFF"])
def test_comments_of_other_programs_are_ignored(container: str, text: str) -> None:
    stream = io.BytesIO()
    with soundfile.SoundFile(stream, "w", _RATE_HZ, 1, format=container) as file:
        file.title = "Rain"
        if text:
            file.comment = text
        file.write(make_noise(samples=3_000, channels=1).T)
    assert comment_of(stream.getvalue()) == text
    assert found_in(stream.getvalue()) is None


@pytest.mark.parametrize("file_format", [AudioFormat.WAV, AudioFormat.FLAC, AudioFormat.MP3, AudioFormat.OGG])
def test_a_text_above_a_megabyte_is_refused(file_format: AudioFormat) -> None:
    with pytest.raises(ValueError, match="longer than 1048576 bytes"):
        found_in(make_file(file_format, text=make_long(MOST_TEXT_BYTES + 1)))


@pytest.mark.parametrize("data", [b"", b"RIFF", b"RIFF\4\0\0\0WAVE", b"not audio at all", bytes(100)])
def test_files_that_are_not_audio_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="cannot be decoded"):
        found_in(data)


def test_wav_files_with_too_many_chunks_are_ignored() -> None:
    plain, tagged = (make_file(AudioFormat.WAV, text=text) for text in (None, _TEXT))
    assert found_in(plain + b"junk\0\0\0\0" * 100 + tagged[len(plain) :]) == _TEXT
    assert found_in(plain + b"junk\0\0\0\0" * 10_000 + tagged[len(plain) :]) is None


_PLAIN, _TAGGED = (make_file(AudioFormat.WAV, text=text, samples=3, channels=1) for text in (None, _TEXT))


@given(
    st.lists(st.tuples(st.integers(len(_PLAIN), len(_TAGGED)), st.integers(0, 8), st.binary(max_size=8)), min_size=1)
)
def test_changed_chunks_are_read_or_refused(edits: list[tuple[int, int, bytes]]) -> None:
    data = _TAGGED
    for start, num_removed, inserted in edits:
        data = data[:start] + inserted + data[start + num_removed :]
    with suppress(ValueError):
        found = found_in(data)
        assert found is None or len(found) <= len(data)


@pytest.mark.parametrize("file_format", TEXT_FORMATS)
def test_a_file_contains_its_recipe_unless_too_long(file_format: AudioFormat) -> None:
    audio = (make_noise(samples=500, channels=1),)
    result = GenerationResult(audio=audio, sample_rate_hz=_RATE_HZ, seeds=(7,), model="m")
    for num_chars, is_there in ((10, True), (6_000, True), (7_000, file_format is not AudioFormat.OPUS)):
        request = GenerationRequest(prompt="\N{HIRAGANA LETTER A}" * num_chars, duration_s=1.0, seed=7)
        finished = finish(result, FileOrder("limit", Encoding(file_format), origin=ClipOrigin.of(request)))
        assert found_in(finished.file.to_bytes()) == (finished.recipes[0].to_json() if is_there else None)
