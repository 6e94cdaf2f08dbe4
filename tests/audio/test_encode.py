from __future__ import annotations

import io
import wave
import zipfile

import numpy as np
import numpy.typing as npt
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from stable_audio_serve.audio.encode import encode_audio, make_zip
from stable_audio_serve.audio.formats import available_formats, media_type
from stable_audio_serve.audio.pcm import to_full_scale_pcm16, to_pcm16
from stable_audio_serve.core.sound import AudioFormat, Encoding


def make_tone(*, duration_s: float = 0.5, rate_hz: int = 44100, channels: int = 2) -> npt.NDArray[np.float32]:
    t = np.arange(int(duration_s * rate_hz)) / rate_hz
    return np.stack([0.5 * np.sin(2 * np.pi * 110 * (c + 1) * t) for c in range(channels)]).astype(np.float32)


@given(arrays(np.float32, (2, 300), elements=st.floats(-2, 2, width=32)))
def test_pcm16_equals_libsndfiles(audio: npt.NDArray[np.float32]) -> None:
    stream = io.BytesIO()
    soundfile.write(stream, audio.T, 44100, format="WAV", subtype="PCM_16")
    expected = soundfile.read(io.BytesIO(stream.getvalue()), dtype="int16")[0]
    np.testing.assert_array_equal(to_pcm16(audio), expected)


@given(arrays(np.float32, (2, 300), elements=st.floats(-2, 2, width=32)))
def test_full_scale_pcm_matches_torch(audio: npt.NDArray[np.float32]) -> None:
    pcm = to_full_scale_pcm16(audio)
    assert pcm.flags.c_contiguous
    if not audio.any():
        assert not pcm.any()
        return
    tensor = torch.from_numpy(audio)
    expected = tensor.div(tensor.abs().max()).clamp(-1, 1).mul(32767).to(torch.int16)
    np.testing.assert_array_equal(pcm, expected.numpy().T)
    assert np.abs(pcm.astype(int)).max() == 32767


def test_pcm16_is_correct_across_blocks_and_for_strided_input() -> None:
    audio = np.random.default_rng(0).uniform(-1.2, 1.2, (50_000, 2)).astype(np.float32).T
    expected = np.clip(np.floor(audio.astype(np.float64) * 32768), -32768, 32767).T
    np.testing.assert_array_equal(to_pcm16(audio), expected)


@pytest.mark.parametrize("samples", [0, 1, 44_100])
@pytest.mark.parametrize(("rate_hz", "channels"), [(44100, 2), (16000, 1), (48000, 2)])
def test_wav_is_read_back_by_two_readers(samples: int, rate_hz: int, channels: int) -> None:
    audio = make_tone(duration_s=1, rate_hz=44100, channels=channels)[:, :samples]
    file = encode_audio(audio, rate_hz, encoding=Encoding(AudioFormat.WAV))
    data = file.to_bytes()
    assert len(data) == file.num_bytes == 44 + 2 * channels * samples
    with wave.open(io.BytesIO(data)) as reader:
        assert (reader.getframerate(), reader.getnchannels(), reader.getsampwidth()) == (rate_hz, channels, 2)
        assert reader.getnframes() == samples
    read, rate = soundfile.read(io.BytesIO(data), dtype="int16", always_2d=True)
    assert rate == rate_hz
    np.testing.assert_array_equal(read, to_pcm16(audio))


def test_chunks_are_bounded_and_add_up_to_the_file() -> None:
    file = encode_audio(make_tone(duration_s=15), 44100, encoding=Encoding(AudioFormat.WAV))
    chunks = list(file.chunks())
    assert max(map(len, chunks)) == 2**20
    assert b"".join(chunks) == file.to_bytes()


def test_flac_holds_the_same_samples_as_wav() -> None:
    audio = make_tone()
    data = encode_audio(audio, 44100, encoding=Encoding(AudioFormat.FLAC)).to_bytes()
    np.testing.assert_array_equal(soundfile.read(io.BytesIO(data), dtype="int16")[0], to_pcm16(audio))


@pytest.mark.parametrize(
    ("file_format", "rate_hz", "expected_rate_hz"),
    [("mp3", 44100, 44100), ("mp3", 1000, 8000), ("ogg", 44100, 44100), ("opus", 44100, 48000)],
)
def test_lossy_files_sound_like_the_original(file_format: str, rate_hz: int, expected_rate_hz: int) -> None:
    audio = make_tone(duration_s=1.0, rate_hz=rate_hz)
    file = encode_audio(audio, rate_hz, encoding=Encoding(AudioFormat(file_format)))
    read, rate = soundfile.read(io.BytesIO(file.to_bytes()), always_2d=True)
    assert rate == expected_rate_hz
    assert len(read) == pytest.approx(rate, abs=2)
    for channel in range(2):
        spectrum = np.abs(np.fft.rfft(read[: rate // 1, channel]))
        assert spectrum.argmax() == pytest.approx(110 * (channel + 1), abs=1)
    assert np.abs(read).max() == pytest.approx(0.5, abs=0.05)  # 0.5 is the tone's level; a click would be louder


def test_opus_keeps_the_exact_length() -> None:
    audio = make_tone(duration_s=1.2345, rate_hz=48000)
    data = encode_audio(audio, 48000, encoding=Encoding(AudioFormat.OPUS)).to_bytes()
    assert soundfile.info(io.BytesIO(data)).frames == int(1.2345 * 48000)


def pages_of(ogg: bytes) -> list[tuple[int, bool]]:
    """Returns the granule position of each page of an Ogg file, and whether the page is marked as the last one."""
    pages, start = [], 0
    while start < len(ogg):
        num_segments = ogg[start + 26]
        pages.append((int.from_bytes(ogg[start + 6 : start + 14], "little", signed=True), bool(ogg[start + 5] & 4)))
        start += 27 + num_segments + sum(ogg[start + 27 : start + 27 + num_segments])
    return pages


def test_positions_in_an_opus_file_never_decrease() -> None:
    rng = np.random.default_rng(0)
    for num_samples in range(86_000, 88_000, 200):
        audio = rng.uniform(-0.2, 0.2, (2, num_samples)).astype(np.float32)
        data = encode_audio(audio, 48_000, encoding=Encoding(AudioFormat.OPUS)).to_bytes()
        positions, are_last = zip(*pages_of(data), strict=True)
        assert list(positions) == sorted(positions)
        assert are_last == (*[False] * (len(are_last) - 1), True)
        assert len(soundfile.read(io.BytesIO(data))[0]) == num_samples


@pytest.mark.parametrize("file_format", available_formats())
def test_the_same_audio_gives_the_same_bytes(file_format: AudioFormat) -> None:
    audio = make_tone(duration_s=2)
    assert (
        encode_audio(audio, 44100, encoding=Encoding(file_format)).to_bytes()
        == encode_audio(audio, 44100, encoding=Encoding(file_format)).to_bytes()
    )


@pytest.mark.parametrize("file_format", available_formats())
@pytest.mark.parametrize("samples", [0, 1])
def test_the_shortest_clips_are_encoded(file_format: AudioFormat, samples: int) -> None:
    file = encode_audio(np.zeros((2, samples), dtype=np.float32), 44100, encoding=Encoding(file_format))
    assert file.media_type == media_type(file_format)


@pytest.mark.parametrize("encoding", [Encoding(AudioFormat.MP3, 32, sample_rate_hz=8000), Encoding(AudioFormat.ULAW)])
def test_a_clip_of_one_sample_is_not_lost_by_resampling(encoding: Encoding) -> None:
    file = encode_audio(np.full((2, 1), 0.5, np.float32), 44100, encoding=encoding)
    form = {"format": "RAW", "channels": 1, "samplerate": 8000, "subtype": "ULAW"}
    read, _ = soundfile.read(
        io.BytesIO(file.to_bytes()), **(form if encoding.file_format is AudioFormat.ULAW else {}), always_2d=True
    )
    assert len(read) == 1


def test_a_long_vorbis_file_does_not_crash() -> None:
    file = encode_audio(np.zeros((2, 44100 * 120), dtype=np.float32), 44100, encoding=Encoding(AudioFormat.OGG))
    assert soundfile.info(io.BytesIO(file.to_bytes())).frames == 44100 * 120


def test_zip_is_deflated_named_and_reproducible() -> None:
    files = [(f"clip-{i}.wav", encode_audio(make_tone(channels=i), 44100)) for i in (1, 2)]
    first, second = make_zip(files), make_zip(files)
    assert first.to_bytes() == second.to_bytes()
    with zipfile.ZipFile(io.BytesIO(first.to_bytes())) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == ["clip-1.wav", "clip-2.wav"]
        assert {entry.compress_type for entry in archive.infolist()} == {zipfile.ZIP_DEFLATED}
        assert archive.read("clip-2.wav") == files[1][1].to_bytes()
