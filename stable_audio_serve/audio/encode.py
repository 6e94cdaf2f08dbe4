"""Encode float audio as files of all formats, and as ZIP archives of several files.

This module writes WAV files and raw samples itself. For the other formats it calls `audio.compress`.

The functions need much CPU time: call them from worker threads, not from an event loop.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from stable_audio_serve.audio.compress import compress
from stable_audio_serve.audio.embedded_text import make_wav_chunk
from stable_audio_serve.audio.formats import file_rate, media_type
from stable_audio_serve.audio.pcm import little_endian, to_pcm16, to_samples, wav_header
from stable_audio_serve.audio.seams import cut_repeated, loop_samples, repeat_around
from stable_audio_serve.core.sound import PLAIN_WAV, AudioFormat, BitDepth, Encoding

if TYPE_CHECKING:
    import numpy.typing as npt

_CHUNK_BYTES = 1_048_576
_AROUND_PARTS = (
    10  # a loop is resampled with 1/10 s of repetition at both ends, which is a whole number of samples at all rates
)
MOST_OPUS_TEXT_CHARS = 40_000  # libsndfile 1.2.2 writes unreadable files if the text is longer than about 51,000


@cache
def name_codecs(*, with_aac: bool = False) -> str:
    """Return the names and versions of the libraries that decode and encode audio.

    The libraries affect the bytes of files, except WAV files and raw samples at the model's rate, which are written
    without these libraries.
    """
    import soundfile
    import soxr

    names = f"soundfile {soundfile.__version__}, libsndfile {soundfile.__libsndfile_version__}, soxr {soxr.__version__}"
    if not with_aac:
        return names
    import av

    return f"{names}, PyAV {av.__version__}"


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


def encode_audio(
    audio: npt.NDArray[np.float32],
    sample_rate_hz: int,
    *,
    encoding: Encoding = PLAIN_WAV,
    text: str | None = None,
    loop_s: float | None = None,
) -> EncodedFile:
    """Encode `audio` (C, S) float32 in -1..1 as a file. `formats.check_encoding` must have accepted `encoding`.

    If the file has another sample rate than the audio (`formats.file_rate`), the audio is resampled. `loop_s` is the
    length of a loop in seconds; the resampled loop still repeats without a seam. G.711 files are mono, and contain the
    mean of the channels. `text` is embedded in the file, and `embedded_text.extract` reads it. Only the formats in
    `formats.TEXT_FORMATS` can contain text. The text must not be empty, and for Opus not longer than
    `MOST_OPUS_TEXT_CHARS`.
    """
    rate_hz = file_rate(encoding, sample_rate_hz)
    audio = as_in_file(audio, sample_rate_hz, encoding=encoding, loop_s=loop_s)
    match encoding.file_format:
        case AudioFormat.WAV:
            return encode_wav(to_samples(audio, encoding.bit_depth or 16), rate_hz, text=text)
        case AudioFormat.PCM:
            return EncodedFile(media_type(AudioFormat.PCM), (little_endian(to_pcm16(audio)),))
        case file_format:
            data = compress(audio, rate_hz, encoding=encoding, text=text)
            return EncodedFile(media_type(file_format), (data,))


def as_in_file(
    audio: npt.NDArray[np.float32], sample_rate_hz: int, *, encoding: Encoding, loop_s: float | None = None
) -> npt.NDArray[np.float32]:
    """Convert `audio` (C, S) float32 to the channels and the sample rate that its file will have.

    `audio` may have any level. `loop_s` is the length of a loop in seconds; the result still repeats without a seam.
    The result has at least one sample unless `audio` is empty.
    """
    if encoding.file_format in (AudioFormat.ULAW, AudioFormat.ALAW):
        audio = audio.mean(axis=0, keepdims=True, dtype=np.float32)
    rate_hz = file_rate(encoding, sample_rate_hz)
    if rate_hz == sample_rate_hz:
        return audio
    import soxr

    if loop_s is None:
        resampled = soxr.resample(audio.T, sample_rate_hz, rate_hz).T
        return resampled if resampled.size else audio[:, :1]
    repeated = repeat_around(audio, sample_rate_hz // _AROUND_PARTS)
    repeated = soxr.resample(repeated.T, sample_rate_hz, rate_hz).T
    return cut_repeated(repeated, rate_hz // _AROUND_PARTS, length=loop_samples(loop_s, rate_hz))


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


def encode_wav(
    samples: npt.NDArray[np.int16] | npt.NDArray[np.int32] | npt.NDArray[np.float32],
    sample_rate_hz: int,
    *,
    text: str | None = None,
) -> EncodedFile:
    """Return a WAV file of interleaved samples (S, C), with `text` embedded after them.

    The file has 16 bits per sample for int16, 32 bits for float32, and the 24 high bits of each sample for int32.
    """
    frames, channels = samples.shape
    data = little_endian(samples)
    coding: BitDepth = "float" if samples.dtype == np.float32 else 24 if samples.dtype == np.int32 else 16
    end = bytes(len(data) % 2) + (b"" if text is None else make_wav_chunk(text))  # chunks begin at even offsets
    header = wav_header(sample_rate_hz, channels=channels, frames=frames, bit_depth=coding, num_more=len(end))
    return EncodedFile(media_type(AudioFormat.WAV), (header, data, *((end,) if end else ())))
