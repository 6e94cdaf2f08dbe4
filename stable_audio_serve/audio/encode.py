"""Encode float audio as WAV, FLAC, MP3, Vorbis and Opus files, and as ZIP archives of several files.

The functions need much CPU time: call them from worker threads, not from an event loop.
"""

from __future__ import annotations

import io
import struct
import sys
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from stable_audio_serve.audio.embedded_text import make_wav_chunk

if TYPE_CHECKING:
    import numpy.typing as npt

_BLOCK = 16_384  # samples converted or written at once: fits the cache; libsndfile crashes on longer Vorbis writes
_CHUNK_BYTES = 1_048_576
_MP3_RATES_HZ = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)
_OPUS_RATE_HZ = 48_000
# libsndfile ends an Opus file with a click. So this many samples of silence are encoded after the clip, and trimmed
# from the finished file.
_OPUS_TAIL = 960
MOST_OPUS_TEXT_CHARS = 40_000  # libsndfile 1.2.2 writes unreadable files if the text is longer than about 51,000
_OGG_SERIAL = 1
_OGG_HEADER_BYTES = 27
_REVERSED_BITS = bytes(int(f"{value:08b}"[::-1], 2) for value in range(256))


class AudioFormat(StrEnum):
    """Formats of output files. `ogg` is Vorbis, and `opus` is Opus in an Ogg container."""

    WAV = "wav"
    FLAC = "flac"
    MP3 = "mp3"
    OGG = "ogg"
    OPUS = "opus"

    @property
    def media_type(self) -> str:
        return {"wav": "audio/wav", "flac": "audio/flac", "mp3": "audio/mpeg"}.get(self.value, "audio/ogg")


@cache
def name_codecs() -> str:
    """Return the names and versions of the libraries that decode and encode audio. They affect the bytes of files.

    WAV files are written without these libraries.
    """
    import soundfile
    import soxr

    return f"soundfile {soundfile.__version__}, libsndfile {soundfile.__libsndfile_version__}, soxr {soxr.__version__}"


@dataclass(frozen=True, slots=True)
class EncodedFile:
    """An encoded file, whose content is divided into several buffers."""

    media_type: str
    buffers: tuple[bytes | memoryview, ...]

    @property
    def num_bytes(self) -> int:
        return sum(len(buffer) for buffer in self.buffers)

    def chunks(self) -> Iterator[bytes]:
        """Yield the content of the file in chunks of at most 1 MiB."""
        for buffer in self.buffers:
            for start in range(0, len(buffer), _CHUNK_BYTES):
                yield bytes(buffer[start : start + _CHUNK_BYTES])

    def to_bytes(self) -> bytes:
        """Return the whole content of the file."""
        return b"".join(self.buffers)


def to_pcm16(audio: npt.NDArray[np.float32]) -> npt.NDArray[np.int16]:
    """Convert `audio` (C, S) float32 to interleaved 16-bit samples (S, C). Values beyond -1..1 are clipped.

    The samples are those that libsndfile writes for PCM_16: floor(x * 32768), at most 32767.
    """
    channels, samples = audio.shape
    out = np.empty((samples, channels), dtype=np.int16)
    scaled, fixed = np.empty(_BLOCK, dtype=np.float32), np.empty(_BLOCK, dtype=np.int32)
    high_half = slice(1, None, 2) if sys.byteorder == "little" else slice(0, None, 2)
    for channel in range(channels):
        for start in range(0, samples, _BLOCK):
            stop = min(start + _BLOCK, samples)
            x, q = scaled[: stop - start], fixed[: stop - start]
            np.multiply(audio[channel, start:stop], np.float32(2**31), out=x)
            # Clip to the range of int32. 2**31 - 128 is the largest float32 below 2**31.
            np.clip(x, np.float32(-(2**31)), np.float32(2**31 - 128), out=x)
            np.copyto(q, np.rint(x, out=x), casting="unsafe")
            out[start:stop, channel] = q.view(np.int16)[high_half]
    return out


def to_full_scale_pcm16(audio: npt.NDArray[np.float32]) -> npt.NDArray[np.int16]:
    """Scale `audio` (C, S) float32 to full scale and convert it to interleaved 16-bit samples (S, C).

    Samples are divided by the peak, multiplied by 32767 and truncated towards zero. Silence stays silence.
    """
    peak = np.abs(audio).max(initial=0.0)
    scaled = np.divide(audio.T, peak or 1.0, dtype=np.float32, order="C")
    return np.multiply(scaled, np.float32(32767), out=scaled).astype(np.int16)


def encode_audio(
    audio: npt.NDArray[np.float32], sample_rate_hz: int, *, file_format: AudioFormat, text: str | None = None
) -> EncodedFile:
    """Encode `audio` (C, S) float32 in -1..1 as a file. WAV and FLAC files have 16-bit samples.

    MP3 and Opus support only some sample rates. Audio at another rate is resampled to the next higher rate, or else to
    the highest. `text` is embedded in the file (`embedded_text.extract` reads it). The text must not be empty, and for
    Opus not longer than `MOST_OPUS_TEXT_CHARS`.
    """
    if file_format is AudioFormat.WAV:
        return encode_wav(to_pcm16(audio), sample_rate_hz, text=text)
    if file_format is AudioFormat.FLAC:
        return _encode_with_libsndfile(to_pcm16(audio), sample_rate_hz, file_format=file_format, text=text)
    rate_hz = _container_rate(sample_rate_hz, file_format)
    samples = np.clip(audio.T, -1.0, 1.0)
    if rate_hz != sample_rate_hz:
        import soxr

        samples = np.clip(soxr.resample(samples, sample_rate_hz, rate_hz), -1.0, 1.0)
    return _encode_with_libsndfile(samples, rate_hz, file_format=file_format, text=text)


def encode_pcm(audio: npt.NDArray[np.float32]) -> EncodedFile:
    """Encode `audio` (C, S) float32 in -1..1 as interleaved 16-bit little-endian samples without a header."""
    return EncodedFile("audio/pcm", (_little_endian(to_pcm16(audio)),))


def make_zip(files: Iterable[tuple[str, EncodedFile]]) -> EncodedFile:
    """Return a compressed ZIP archive of (name, file) pairs. Equal names and files give an archive with equal bytes."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, file in files:
            entry = zipfile.ZipInfo(name)  # has the date 1980, so that the archive does not depend on the time
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.file_size = file.num_bytes
            with archive.open(entry, "w") as member:
                for buffer in file.buffers:
                    member.write(buffer)
    return EncodedFile("application/zip", (stream.getbuffer(),))


def encode_wav(pcm: npt.NDArray[np.int16], sample_rate_hz: int, *, text: str | None = None) -> EncodedFile:
    """Return a WAV file of interleaved samples (S, C), with `text` embedded after them."""
    channels = pcm.shape[1]
    data = _little_endian(pcm)
    frame_bytes = 2 * channels
    chunks = () if text is None else (make_wav_chunk(text),)
    riff = struct.pack("<4sI4s", b"RIFF", 36 + len(data) + sum(map(len, chunks)), b"WAVE")
    rates = (sample_rate_hz, sample_rate_hz * frame_bytes)
    layout = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, channels, *rates, frame_bytes, 16)
    header = riff + layout + struct.pack("<4sI", b"data", len(data))
    return EncodedFile(AudioFormat.WAV.media_type, (header, data, *chunks))


def _little_endian(pcm: npt.NDArray[np.int16]) -> memoryview:
    return pcm.astype("<i2", copy=False).reshape(-1).view(np.uint8).data


def _container_rate(sample_rate_hz: int, file_format: AudioFormat) -> int:
    if file_format is AudioFormat.OPUS:
        return _OPUS_RATE_HZ
    if file_format is AudioFormat.MP3:
        return next((rate for rate in _MP3_RATES_HZ if rate >= sample_rate_hz), _MP3_RATES_HZ[-1])
    return sample_rate_hz


def _encode_with_libsndfile(
    samples: npt.NDArray[np.int16] | npt.NDArray[np.float32],
    sample_rate_hz: int,
    *,
    file_format: AudioFormat,
    text: str | None,
) -> EncodedFile:
    import soundfile

    container, subtype = {
        AudioFormat.FLAC: ("FLAC", "PCM_16"),
        AudioFormat.MP3: ("MP3", "MPEG_LAYER_III"),
        AudioFormat.OGG: ("OGG", "VORBIS"),
        AudioFormat.OPUS: ("OGG", "OPUS"),
    }[file_format]
    stream = io.BytesIO()
    channels = samples.shape[1]
    with soundfile.SoundFile(stream, "w", sample_rate_hz, channels, format=container, subtype=subtype) as file:
        if text is not None:
            file.comment = text
        for start in range(0, len(samples), _BLOCK):
            file.write(samples[start : start + _BLOCK])
        if file_format is AudioFormat.OPUS:
            file.write(np.zeros((_OPUS_TAIL, channels), dtype=np.float32))
    if container != "OGG":
        return EncodedFile(file_format.media_type, (stream.getbuffer(),))
    data = bytearray(stream.getbuffer())
    _rewrite_ogg(data, trim_samples=_OPUS_TAIL if file_format is AudioFormat.OPUS else 0)
    return EncodedFile(file_format.media_type, (memoryview(data),))


def _rewrite_ogg(data: bytearray, *, trim_samples: int) -> None:
    """Set a fixed serial number in every page of the Ogg file in `data`, and trim `trim_samples` from its end.

    libsndfile writes a random serial number, but equal audio must give equal bytes. RFC 3533 defines the layout of Ogg
    pages and their checksum. RFC 7845, section 4.4, defines how the end of an Opus file is trimmed.
    """
    start = 0
    while start < len(data):
        payload_start = start + _OGG_HEADER_BYTES + data[start + 26]
        stop = payload_start + sum(data[start + _OGG_HEADER_BYTES : payload_start])
        struct.pack_into("<I", data, start + 14, _OGG_SERIAL)
        if stop == len(data):
            (granule,) = struct.unpack_from("<q", data, start + 6)
            struct.pack_into("<q", data, start + 6, granule - trim_samples)
        data[start + 22 : start + 26] = bytes(4)
        data[start + 22 : start + 26] = _ogg_checksum(data[start:stop])
        start = stop


def _ogg_checksum(page: bytearray) -> bytes:
    # Ogg's CRC-32 differs from zlib's in two ways: the bits of every byte and of the result are in reverse order, and
    # the CRC is not inverted at the start and at the end.
    value = zlib.crc32(page.translate(_REVERSED_BITS), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return value.to_bytes(4, "big").translate(_REVERSED_BITS)
