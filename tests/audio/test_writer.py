"""Files that are written block by block are compared with the files that `encode_audio` makes from the whole audio."""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
import pytest
import soundfile

from stable_audio_serve.audio.embedded_text import extract
from stable_audio_serve.audio.encode import encode_audio
from stable_audio_serve.audio.formats import TEXT_FORMATS
from stable_audio_serve.audio.loudness import ClipMeter, describe_clip
from stable_audio_serve.audio.pcm import wav_header
from stable_audio_serve.audio.section_files import SectionDecoder, encode_section
from stable_audio_serve.audio.writer import AudioWriter, StreamFile
from stable_audio_serve.core.sound import AudioFormat, Encoding

RATE_HZ = 44100
EXACT = [
    Encoding(),
    Encoding(bit_depth=24),
    Encoding(bit_depth="float"),
    Encoding(AudioFormat.FLAC),
    Encoding(AudioFormat.FLAC, bit_depth=24),
    Encoding(AudioFormat.MP3),
    Encoding(AudioFormat.MP3, bitrate_kbps=192),
    Encoding(AudioFormat.OGG),
    Encoding(AudioFormat.PCM),
]


def make_audio(duration_s: float = 2.03) -> npt.NDArray[np.float32]:
    rng = np.random.default_rng(7)
    return (0.2 * rng.standard_normal((2, int(duration_s * RATE_HZ)))).astype(np.float32)


def write(audio: npt.NDArray[np.float32], encoding: Encoding, *, text: str | None = None) -> bytes:
    file = io.BytesIO()
    writer = AudioWriter(file, RATE_HZ, encoding=encoding, text=text)
    for start in range(0, audio.shape[1], 20_011):
        writer.write(audio[:, start : start + 20_011])
    writer.close()
    writer.close()
    return file.getvalue()


@pytest.mark.parametrize("encoding", EXACT)
def test_blocks_give_the_bytes_of_the_whole(encoding: Encoding) -> None:
    audio = make_audio()
    text = '{"recipe":1}' if encoding.file_format in TEXT_FORMATS else None
    data = write(audio, encoding, text=text)
    assert data == encode_audio(audio, RATE_HZ, encoding=encoding, text=text).to_bytes()
    if text:
        assert extract(io.BytesIO(data)) == text


@pytest.mark.parametrize(
    "encoding",
    [
        Encoding(AudioFormat.OPUS),
        Encoding(AudioFormat.WAV, sample_rate_hz=22050),
        Encoding(AudioFormat.OGG, bitrate_kbps=128),
        Encoding(AudioFormat.FLAC, sample_rate_hz=48_000),
    ],
)
def test_resampled_blocks_give_the_length_of_the_whole(encoding: Encoding) -> None:
    audio = make_audio()
    found, expected = (
        soundfile.read(io.BytesIO(data))[0]
        for data in (write(audio, encoding), encode_audio(audio, RATE_HZ, encoding=encoding).to_bytes())
    )
    assert abs(len(found) - len(expected)) <= 1
    both = min(len(found), len(expected))
    if encoding.file_format in (AudioFormat.WAV, AudioFormat.FLAC):
        assert np.abs(found[:both] - expected[:both]).max() < 1e-3


def test_changes_of_sent_bytes_are_lost() -> None:
    file = StreamFile()
    file.write(b"abcd")
    file.seek(2)
    file.write(b"xyz")
    assert file.take() == b"abcdz"


@pytest.mark.parametrize("is_known", [False, True])
def test_growing_file_says_whether_its_length_is_known(is_known: bool) -> None:
    audio, file = make_audio(), StreamFile()
    num_samples = audio.shape[1] if is_known else None
    writer = AudioWriter(file, RATE_HZ, encoding=Encoding(), is_growing=True, num_samples=num_samples)
    parts = []
    for start in range(0, audio.shape[1], 20_011):
        writer.write(audio[:, start : start + 20_011])
        parts.append(file.take())
    writer.close()
    parts.append(file.take())
    data, whole = b"".join(parts), encode_audio(audio, RATE_HZ).to_bytes()
    sizes = (whole[4:8], whole[40:44]) if is_known else (b"\xff" * 4, b"\xff" * 4)
    assert (data[4:8], data[40:44]) == sizes
    assert data[44:] == whole[44:]


def test_section_files_read_back_exactly_in_chunks_of_any_size() -> None:
    audio = make_audio() * 7
    data = encode_section(audio, RATE_HZ).to_bytes()
    decoder, blocks = SectionDecoder(num_bytes=len(data), num_samples=audio.shape[1]), []
    for start in range(0, len(data), 1_001):
        block = decoder.decode(data[start : start + 1_001])
        if block.size:
            blocks.append(block)
    np.testing.assert_array_equal(np.concatenate(blocks, axis=1), audio)


@pytest.mark.parametrize("duration_s", [0.2, 3.33, 17.06])
def test_clip_measured_in_blocks_has_the_loudness_of_the_whole(duration_s: float) -> None:
    audio = make_audio(duration_s) * np.linspace(0.1, 1, int(duration_s * RATE_HZ), dtype=np.float32)
    meter, expected = ClipMeter(RATE_HZ), describe_clip(audio, RATE_HZ, seed=1)
    for start in range(0, audio.shape[1], 33_333):
        meter.add(audio[:, start : start + 33_333])
    found = meter.describe(seed=1)
    assert (found.peak, found.is_silent) == (expected.peak, expected.is_silent)
    if expected.loudness_lufs is None:
        assert found.loudness_lufs is None
    else:
        assert found.loudness_lufs == pytest.approx(expected.loudness_lufs, abs=1e-3)


def test_wav_above_4_gib_has_the_sizes_of_unknown_lengths() -> None:
    unknown = (2**32 - 1).to_bytes(4, "little")
    for seconds, is_known in ((12_000, True), (12_175, False)):
        header = wav_header(44_100, channels=2, frames=seconds * 44_100, bit_depth="float")
        assert (header[4:8] != unknown, header[-4:] != unknown) == (is_known, is_known)
