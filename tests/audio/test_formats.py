"""Every output format, bit rate, bit depth and sample rate, read back by libsndfile and compared with the audio."""

from __future__ import annotations

import io
import struct

import numpy as np
import numpy.typing as npt
import pytest
import soundfile

from stable_audio_serve.audio.encode import encode_audio
from stable_audio_serve.audio.formats import SAMPLE_RATES_HZ, check_encoding
from stable_audio_serve.core.errors import InvalidRequestError
from stable_audio_serve.core.sound import AudioFormat, BitDepth, Encoding
from tests.parameters import some

RATE_HZ = 44_100
LOSSY = ("mp3", "ogg", "opus")


def make_music(duration_s: float = 3.0) -> npt.NDArray[np.float32]:
    """Return two channels (2, S) float32 of tones of 300 and 500 Hz with bursts of noise, below full scale."""
    t = np.arange(round(duration_s * RATE_HZ)) / RATE_HZ
    noise = 0.3 * np.exp(-(t % 0.5) * 6) * np.random.default_rng(1).uniform(-1, 1, (2, len(t)))
    tones = 0.3 * np.sin(2 * np.pi * np.array([[300], [500]]) * t)
    return (noise + tones).astype(np.float32)


def encode(name: str, audio: npt.NDArray[np.float32] | None = None, **fields: int | str) -> bytes:
    encoding = Encoding(AudioFormat(name), **fields)  # type: ignore[arg-type]
    check_encoding(encoding)
    return encode_audio(make_music() if audio is None else audio, RATE_HZ, encoding=encoding).to_bytes()


def decode(data: bytes, **raw: object) -> tuple[npt.NDArray[np.float64], int]:
    samples, rate_hz = soundfile.read(io.BytesIO(data), always_2d=True, **raw)
    return samples.T, rate_hz


def lowest(audio: npt.NDArray[np.float64], rate_hz: int, *, below_hz: float) -> npt.NDArray[np.float64]:
    """Return the spectrum of the first second of `audio`, below a frequency. It does not depend on the sample rate."""
    spectrum = np.abs(np.fft.rfft(audio[:, :rate_hz])) / rate_hz
    return np.asarray(spectrum[:, : round(below_hz)])


@pytest.mark.parametrize("name", ["wav", "flac"])
@pytest.mark.parametrize(("bit_depth", "subtype"), [(16, "PCM_16"), (24, "PCM_24"), ("float", "FLOAT")])
def test_samples_have_the_bit_depth(name: str, bit_depth: BitDepth, subtype: str) -> None:
    if (name, bit_depth) == ("flac", "float"):
        return
    audio = make_music()
    data = encode(name, audio, bit_depth=bit_depth)
    assert soundfile.info(io.BytesIO(data)).subtype == subtype
    stream = io.BytesIO()
    soundfile.write(stream, audio.T, RATE_HZ, format="wav", subtype=subtype)
    expected, _ = decode(stream.getvalue(), dtype="float64")
    np.testing.assert_array_equal(decode(data, dtype="float64")[0], expected)
    if bit_depth == "float":
        np.testing.assert_array_equal(decode(data, dtype="float32")[0], audio)


@pytest.mark.parametrize("bit_depth", [24, "float"])
@pytest.mark.parametrize("samples", [0, 1, 3])
def test_short_wav_files_are_well_formed(bit_depth: BitDepth, samples: int) -> None:
    for channels in (1, 2):
        audio = make_music()[:channels, :samples]
        encoding = Encoding(AudioFormat.WAV, bit_depth=bit_depth)
        data = encode_audio(audio, RATE_HZ, encoding=encoding, text='{"a": 1}').to_bytes()
        assert struct.unpack_from("<I", data, 4)[0] == len(data) - 8
        assert len(data) % 2 == 0
        assert decode(data)[0].shape == (channels, samples)


def test_pcm_has_no_header_and_the_samples_of_a_wav_file() -> None:
    assert encode("pcm") == encode("wav")[44:]
    assert encode("pcm", sample_rate_hz=8000) == encode("wav", sample_rate_hz=8000)[44:]


@pytest.mark.parametrize("rate_hz", some(SAMPLE_RATES_HZ, (8000, 48_000)))
@pytest.mark.parametrize("name", ["wav", "flac", "mp3", "ogg", "opus", "pcm"])
def test_files_have_the_sample_rate(name: str, rate_hz: int) -> None:
    if name == "opus" and rate_hz in (22_050, 32_000, 44_100):
        return
    audio = make_music(2.0)
    data = encode(name, audio, sample_rate_hz=rate_hz)
    raw = {"format": "RAW", "samplerate": rate_hz, "channels": 2, "subtype": "PCM_16"} if name == "pcm" else {}
    read, found_hz = decode(data, **raw)
    assert found_hz == rate_hz
    assert read.shape[1] == pytest.approx(2 * rate_hz, abs=1)
    expected, actual = (lowest(each, rate, below_hz=2000) for each, rate in ((audio, RATE_HZ), (read, rate_hz)))
    assert [int(row.argmax()) for row in actual] == [300, 500]
    assert np.abs(actual - expected).max() < 0.02


@pytest.mark.parametrize(("name", "subtype"), [("ulaw", "ULAW"), ("alaw", "ALAW")])
def test_telephone_formats_are_mono_at_8000_hz(name: str, subtype: str) -> None:
    audio = make_music(2.0)
    data = encode(name, audio)
    assert len(data) == 16_000
    read, _ = decode(data, format="RAW", samplerate=8000, channels=1, subtype=subtype)
    spectrum = lowest(read, 8000, below_hz=2000)
    assert set(np.argsort(spectrum[0])[-2:]) == {300, 500}
    expected = lowest(audio.mean(axis=0, keepdims=True), RATE_HZ, below_hz=2000)
    assert np.abs(spectrum - expected).max() < 0.01


@pytest.mark.parametrize("kbps", some((32, 64, 96, 128, 192, 256, 320), (64, 192)))
@pytest.mark.parametrize("name", LOSSY)
def test_files_have_the_bit_rate(name: str, kbps: int) -> None:
    audio = make_music(5.0)
    data = encode(name, audio, bitrate_kbps=kbps)
    share = 0.06 if kbps > 64 else 0.12 if name != "ogg" else 0.35  # with noise, Vorbis exceeds its lowest bit rate
    assert len(data) * 8 / 5000 == pytest.approx(kbps, rel=share)
    read, rate_hz = decode(data)
    assert read.shape[1] == pytest.approx(5 * rate_hz, abs=1)
    actual = lowest(read, rate_hz, below_hz=1000)
    assert [int(row.argmax()) for row in actual] == [300, 500]
    assert np.abs(actual - lowest(audio, RATE_HZ, below_hz=1000)).max() < 0.02


@pytest.mark.parametrize(("kbps", "rate_hz"), [(32, 44_100), (32, 22_050), (48, 24_000), (8, 8000), (8, None)])
@pytest.mark.parametrize("text", [None, '{"a": 1}'])
def test_low_mp3_bit_rates_keep_length_and_position(kbps: int, rate_hz: int | None, text: str | None) -> None:
    audio = np.zeros((2, 2 * RATE_HZ), dtype=np.float32)
    audio[:, RATE_HZ : RATE_HZ + 4000] = 0.5 * np.sin(np.arange(4000) / 20)
    encoding = Encoding(AudioFormat.MP3, kbps, None, rate_hz)
    data = encode_audio(audio, RATE_HZ, encoding=encoding, text=text).to_bytes()
    read, found_hz = decode(data)
    assert found_hz == (rate_hz or 8000)
    assert read.shape[1] == pytest.approx(2 * found_hz, abs=1)
    energy = np.cumsum(read[0] ** 2)
    middle = np.searchsorted(energy, energy[-1] / 2) / found_hz
    assert middle == pytest.approx(1 + 2000 / RATE_HZ, abs=0.002)


@pytest.mark.parametrize("kbps", some([None, 40, 128, 176, 180, 208, 210, 240, 256, 320], (None, 128, 180)))
@pytest.mark.parametrize("name", LOSSY)
def test_files_have_the_level_of_the_audio(name: str, kbps: int | None) -> None:
    audio = np.tile(np.sin(np.arange(RATE_HZ) / 18), (2, 1)).astype(np.float32)  # at full scale
    read, rate_hz = decode(encode(name, audio) if kbps is None else encode(name, audio, bitrate_kbps=kbps))
    middle = read[:, rate_hz // 4 : -rate_hz // 4]
    assert np.sqrt(np.mean(middle**2)) == pytest.approx(np.sqrt(0.5), rel=0.015)  # Vorbis adds 1 % to a tone


@pytest.mark.parametrize("rate_hz", [22_050, 11_025])
def test_mp3_files_at_low_rates_have_the_level_of_the_audio(rate_hz: int) -> None:
    """Their bit rate is at most 160 kbit/s, so a higher one must not change the level."""
    audio = np.tile(0.5 * np.sin(np.arange(2 * rate_hz) / 18), (2, 1)).astype(np.float32)
    read, _ = decode(encode_audio(audio, rate_hz, encoding=Encoding(AudioFormat.MP3, 320)).to_bytes())
    assert np.sqrt(np.mean(read[:, rate_hz // 2 : -rate_hz // 2] ** 2)) == pytest.approx(np.sqrt(0.125), rel=0.015)


@pytest.mark.slow
def test_long_vorbis_files_have_the_bit_rate() -> None:
    data = encode("ogg", make_music(45.0), bitrate_kbps=160)
    assert len(data) * 8 / 45_000 == pytest.approx(160, rel=0.08)


@pytest.mark.parametrize("rate_hz", [8000, 48_000])
def test_loops_at_other_rates_repeat_without_a_seam(rate_hz: int) -> None:
    period = np.arange(RATE_HZ // 2) / RATE_HZ
    loop = np.stack([0.5 * np.sin(2 * np.pi * 440 * period + phase) for phase in (0.5, 2.0)]).astype(np.float32)
    encoding = Encoding(AudioFormat.WAV, bit_depth="float", sample_rate_hz=rate_hz)
    read, _ = decode(encode_audio(loop, RATE_HZ, encoding=encoding, loop_s=0.5).to_bytes())
    assert read.shape[1] == rate_hz // 2
    t = np.arange(rate_hz // 2) / rate_hz
    expected = np.stack([0.5 * np.sin(2 * np.pi * 440 * t + phase) for phase in (0.5, 2.0)])
    assert np.abs(read - expected).max() < 1e-4


@pytest.mark.parametrize("rate_hz", [8000, 22_050, 48_000])
def test_loops_have_their_exact_length_at_other_rates(rate_hz: int) -> None:
    for bpm in range(90, 130):
        loop_s = 4 * 60 / bpm
        loop = np.zeros((1, int(loop_s * RATE_HZ + 1e-6)), np.float32)
        data = encode_audio(loop, RATE_HZ, encoding=Encoding(AudioFormat.PCM, sample_rate_hz=rate_hz), loop_s=loop_s)
        assert data.num_bytes // 2 == int(loop_s * rate_hz + 1e-6), bpm


@pytest.mark.parametrize(
    "fields",
    [{"bitrate_kbps": 128}, {"sample_rate_hz": 16_000}, {"bitrate_kbps": 64, "sample_rate_hz": 24_000}],
)
@pytest.mark.parametrize("name", LOSSY)
def test_encoding_repeats_exactly(name: str, fields: dict[str, int]) -> None:
    audio = make_music(1.0)
    assert encode(name, audio, **fields) == encode(name, audio, **fields)


@pytest.mark.parametrize(
    ("encoding", "field", "allowed"),
    [
        (Encoding(AudioFormat.WAV, 128), "bitrate", "only mp3, ogg"),  # more with PyAV
        (Encoding(AudioFormat.PCM, 128), "bitrate", "unset for pcm"),
        (Encoding(AudioFormat.MP3, 16, None, 44_100), "bitrate", "from 32 to 320"),
        (Encoding(AudioFormat.MP3, 192, None, 22_050), "bitrate", "from 8 to 160"),
        (Encoding(AudioFormat.MP3, 128, None, 8000), "bitrate", "from 8 to 64"),
        (Encoding(AudioFormat.OPUS, 321), "bitrate", "from 8 to 320"),
        (Encoding(AudioFormat.MP3, None, 24), "bit_depth", "unset for mp3"),
        (Encoding(AudioFormat.FLAC, None, "float"), "bit_depth", "16 or 24"),
        (Encoding(AudioFormat.PCM, None, 24), "bit_depth", "16"),
        (Encoding(AudioFormat.WAV, None, None, 11_025), "sample_rate", "8000, 16000"),
        (Encoding(AudioFormat.OPUS, None, None, 44_100), "sample_rate", "24000 or 48000"),
        (Encoding(AudioFormat.ULAW, None, None, 16_000), "sample_rate", "8000"),
    ],
)
def test_values_that_a_format_lacks_are_refused(encoding: Encoding, field: str, allowed: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        check_encoding(encoding)
    assert refused.value.field == field
    assert allowed in refused.value.message
