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
from typing import TYPE_CHECKING, Any

import numpy as np

from stable_audio_serve.audio.embedded_text import make_wav_chunk

if TYPE_CHECKING:
    import numpy.typing as npt

BLOCK = 16_384  # samples converted or written at once: fits the cache; libsndfile crashes on longer Vorbis writes
_CHUNK_BYTES = 1_048_576
_MP3_RATES_HZ = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)
_OPUS_RATE_HZ = 48_000
# libsndfile ends an Opus file with a click. So this many samples of silence are encoded after the clip, and trimmed
# from the finished file.
OPUS_TAIL = 960
MOST_OPUS_TEXT_CHARS = 40_000  # libsndfile 1.2.2 writes unreadable files if the text is longer than about 51,000
_UNKNOWN = 0xFFFFFFFF  # the size in the header of a WAV file whose length is unknown
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


# Names of libsndfile's formats and subtypes.
CONTAINERS = {
    AudioFormat.FLAC: ("FLAC", "PCM_16"),
    AudioFormat.MP3: ("MP3", "MPEG_LAYER_III"),
    AudioFormat.OGG: ("OGG", "VORBIS"),
    AudioFormat.OPUS: ("OGG", "OPUS"),
}


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
    scaled, fixed = np.empty(BLOCK, dtype=np.float32), np.empty(BLOCK, dtype=np.int32)
    high_half = slice(1, None, 2) if sys.byteorder == "little" else slice(0, None, 2)
    for channel in range(channels):
        for start in range(0, samples, BLOCK):
            stop = min(start + BLOCK, samples)
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
    rate_hz = container_rate(sample_rate_hz, file_format)
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
    data = _little_endian(pcm)
    chunks = () if text is None else (make_wav_chunk(text),)
    num_more = sum(map(len, chunks))
    header = wav_header(sample_rate_hz, channels=pcm.shape[1], num_bytes=len(data), num_more=num_more)
    return EncodedFile(AudioFormat.WAV.media_type, (header, data, *chunks))


def wav_header(sample_rate_hz: int, *, channels: int, num_bytes: int | None, num_more: int = 0) -> bytes:
    """Return the header of a WAV file with 16-bit samples, which take `num_bytes`; None = their number is unknown.

    `num_more` is the length of the chunks after the samples.
    """
    frame_bytes = 2 * channels
    size, riff_size = (_UNKNOWN, _UNKNOWN) if num_bytes is None else (num_bytes, 36 + num_bytes + num_more)
    rates = (sample_rate_hz, sample_rate_hz * frame_bytes)
    layout = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, channels, *rates, frame_bytes, 16)
    return struct.pack("<4sI4s", b"RIFF", riff_size, b"WAVE") + layout + struct.pack("<4sI", b"data", size)


def _little_endian(pcm: npt.NDArray[np.int16]) -> memoryview:
    return pcm.astype("<i2", copy=False).reshape(-1).view(np.uint8).data


def container_rate(sample_rate_hz: int, file_format: AudioFormat) -> int:
    """Return the sample rate of a file in this format: `sample_rate_hz`, or one that the format supports."""
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

    container, subtype = CONTAINERS[file_format]
    stream = io.BytesIO()
    channels = samples.shape[1]
    with soundfile.SoundFile(stream, "w", sample_rate_hz, channels, format=container, subtype=subtype) as file:
        if text is not None:
            file.comment = text
        for start in range(0, len(samples), BLOCK):
            file.write(samples[start : start + BLOCK])
        if file_format is AudioFormat.OPUS:
            file.write(np.zeros((OPUS_TAIL, channels), dtype=np.float32))
    if container == "OGG":
        rewrite_ogg(stream, trim_samples=OPUS_TAIL if file_format is AudioFormat.OPUS else 0)
    return EncodedFile(file_format.media_type, (stream.getbuffer(),))


def rewrite_ogg(file: Any, *, trim_samples: int) -> None:
    """Set a fixed serial number in every page of an Ogg file, and trim `trim_samples` from its end.

    `file` is a file object that can be read and written.

    libsndfile writes a random serial number, but equal audio must give equal bytes. RFC 3533 defines the layout of Ogg
    pages and their checksum. RFC 7845, section 4.4, defines how the end of an Opus file is trimmed.
    """
    start, end = 0, file.seek(0, 2)
    while start < end:
        file.seek(start)
        page = bytearray(file.read(_OGG_HEADER_BYTES))
        page += file.read(page[26])
        page += file.read(sum(page[_OGG_HEADER_BYTES:]))
        struct.pack_into("<I", page, 14, _OGG_SERIAL)
        if start + len(page) == end:
            (granule,) = struct.unpack_from("<q", page, 6)
            struct.pack_into("<q", page, 6, granule - trim_samples)
        page[22:26] = bytes(4)
        page[22:26] = _ogg_checksum(page)
        file.seek(start)
        file.write(page)
        start += len(page)


def _ogg_checksum(page: bytearray) -> bytes:
    # Ogg's CRC-32 differs from zlib's in two ways: the bits of every byte and of the result are in reverse order, and
    # the CRC is not inverted at the start and at the end.
    value = zlib.crc32(page.translate(_REVERSED_BITS), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return value.to_bytes(4, "big").translate(_REVERSED_BITS)
