"""Compress float audio with libsndfile (FLAC, MP3, Vorbis, Opus, G.711) or with PyAV (AAC).

The functions need much CPU time: call them from worker threads, not from an event loop.
"""

from __future__ import annotations

import io
import struct
import zlib
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from stable_audio_serve.audio.embedded_text import from_syncsafe
from stable_audio_serve.audio.formats import mp3_factor, mp3_level
from stable_audio_serve.audio.pcm import to_samples
from stable_audio_serve.core.sound import AudioFormat, Encoding

if TYPE_CHECKING:
    import numpy.typing as npt
    from soundfile import SoundFile

_BLOCK = 16_384  # samples written at once: libsndfile crashes on longer Vorbis writes
# libsndfile ends an Opus file with a click. So this many seconds of silence are encoded after the clip, and trimmed
# from the finished file.
_OPUS_TAIL_S = 0.02
_OPUS_RATE_HZ = 48_000  # the unit of positions in Opus files
_OPUS_KBPS = (6, 256)  # bit rate per channel at libsndfile's compression levels 1 and 0
_OGG_KBPS = 2.5  # bit rate that the Ogg container adds to Opus
_OGG_SERIAL = 1
_OGG_HEADER_BYTES = 27
_OGG_LAST_PAGE = 4  # a bit of byte 5 of a page
_REVERSED_BITS = bytes(int(f"{value:08b}"[::-1], 2) for value in range(256))
_SUBTYPES = {
    AudioFormat.MP3: ("MP3", "MPEG_LAYER_III"),
    AudioFormat.OGG: ("OGG", "VORBIS"),
    AudioFormat.OPUS: ("OGG", "OPUS"),
    AudioFormat.ULAW: ("RAW", "ULAW"),
    AudioFormat.ALAW: ("RAW", "ALAW"),
}
_VORBIS_TRIES = 6
_VORBIS_TOLERANCE = 0.03  # of the bit rate
_VORBIS_EXCERPTS = 6  # number of excerpts; audio that is not longer than all of them is encoded whole
_VORBIS_EXCERPT_S = 5
_MPEG_DELAY = 576  # samples that LAME puts before the audio
_MP3_KBPS = {
    1: (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),  # MPEG 1
    0: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),  # MPEG 2 and 2.5
}
_SYNC = b"\xff"  # the first byte of an MP3 frame
_AAC_KBPS = 128
_AAC_CONTAINERS = {AudioFormat.M4A: "ipod", AudioFormat.AAC: "adts"}


class Writable(Protocol):
    """A file object that libsndfile can write to."""

    def write(self, data: bytes, /) -> int: ...
    def read(self, num_bytes: int = -1, /) -> bytes: ...
    def seek(self, offset: int, whence: int = 0, /) -> int: ...
    def tell(self) -> int: ...
    def truncate(self, size: int, /) -> int: ...


class Encoder(Protocol):
    """Encodes one file block by block."""

    def write(self, block: npt.NDArray[np.float32]) -> None:
        """Encode the next samples (C, S). Values beyond -1..1 are clipped."""
        ...

    def close(self) -> None:
        """Complete the file."""
        ...


def compress(
    audio: npt.NDArray[np.float32], sample_rate_hz: int, *, encoding: Encoding, text: str | None = None
) -> memoryview:
    """Return a compressed file of `audio` (C, S), see `open_encoder`."""
    stream = io.BytesIO()
    encoder = open_encoder(stream, sample_rate_hz, encoding=encoding, first=audio, text=text)
    encoder.write(audio)
    encoder.close()
    if encoding.file_format is AudioFormat.MP3 and encoding.bitrate_kbps is not None:
        return _with_length(stream.getbuffer(), num_samples=audio.shape[1])
    return stream.getbuffer()


def open_encoder(
    file: Writable, sample_rate_hz: int, *, encoding: Encoding, first: npt.NDArray[np.float32], text: str | None = None
) -> Encoder:
    """Begin a compressed file: write to the empty file object `file`. `first` (C, S) has the first samples.

    FLAC files have 16 or 24 bits per sample. G.711 files have no header. An MP3 file has the constant bit rate
    `encoding.bitrate_kbps`. A Vorbis or Opus file has about this bit rate on average, or the nearest one that
    libsndfile can reach. Without a bit rate, AAC files have the bit rate _AAC_KBPS, and the other formats have
    libsndfile's default quality.
    """
    if encoding.file_format in _AAC_CONTAINERS:
        return _AacEncoder(file, sample_rate_hz, channels=len(first), encoding=encoding)
    return _SoundFileEncoder(file, sample_rate_hz, encoding=encoding, first=first, text=text)


class _SoundFileEncoder:
    def __init__(
        self,
        file: Writable,
        sample_rate_hz: int,
        *,
        encoding: Encoding,
        first: npt.NDArray[np.float32],
        text: str | None,
    ) -> None:
        import soundfile

        self._file, self._encoding, self._channels = file, encoding, len(first)
        file_format = encoding.file_format
        depth = "PCM_24" if encoding.bit_depth == 24 else "PCM_16"
        container, subtype = ("FLAC", depth) if file_format is AudioFormat.FLAC else _SUBTYPES[file_format]
        options = _find_options(np.clip(first.T, -1.0, 1.0), sample_rate_hz, encoding=encoding)
        self._tail = round(_OPUS_TAIL_S * sample_rate_hz) if file_format is AudioFormat.OPUS else 0
        self._trim = self._tail * _OPUS_RATE_HZ // sample_rate_hz
        self._sound = soundfile.SoundFile(
            file, "w", sample_rate_hz, len(first), format=container, subtype=subtype, **options
        )
        if text is not None:
            self._sound.comment = text

    def write(self, block: npt.NDArray[np.float32]) -> None:
        if self._encoding.file_format is AudioFormat.FLAC:
            _write(self._sound, to_samples(block, self._encoding.bit_depth or 16))
        else:
            samples = np.clip(block.T, -1.0, 1.0)
            if self._encoding.file_format is AudioFormat.MP3 and self._encoding.bitrate_kbps is not None:
                # LAME lowers the level at constant bit rates, so the samples are raised, perhaps beyond -1..1.
                samples /= np.float32(mp3_factor(self._encoding.bitrate_kbps, self._sound.samplerate))
            _write(self._sound, samples)

    def close(self) -> None:
        if self._tail:
            _write(self._sound, np.zeros((self._tail, self._channels), np.float32))
        self._sound.close()
        if self._encoding.file_format in (AudioFormat.OGG, AudioFormat.OPUS):
            _rewrite_ogg(self._file, trim_samples=self._trim)


class _AacEncoder:
    def __init__(self, file: Writable, sample_rate_hz: int, *, channels: int, encoding: Encoding) -> None:
        import av

        self._rate_hz, self._num_samples = sample_rate_hz, 0
        self._layout = "mono" if channels == 1 else "stereo"
        name, options = _AAC_CONTAINERS[encoding.file_format], {"fflags": "+bitexact"}
        if encoding.file_format is AudioFormat.M4A:
            options["movie_timescale"] = str(sample_rate_hz)  # the unit of the clip's length, a millisecond by default
        self._container: Any = av.open(file, "w", format=name, options=options)
        self._track: Any = self._container.add_stream("aac", rate=sample_rate_hz, layout=self._layout)
        self._track.bit_rate = (encoding.bitrate_kbps or _AAC_KBPS) * 1000
        self._track.codec_context.flags |= av.codec.context.Flags.bitexact

    def write(self, block: npt.NDArray[np.float32]) -> None:
        import av

        if not block.shape[1]:
            return
        planes = np.ascontiguousarray(np.clip(block, -1.0, 1.0))
        frame = av.AudioFrame.from_ndarray(planes, format="fltp", layout=self._layout)
        frame.sample_rate, frame.pts = self._rate_hz, self._num_samples
        self._num_samples += block.shape[1]
        self._container.mux(self._track.encode(frame))

    def close(self) -> None:
        if not self._num_samples:  # PyAV cannot write a file without samples
            self.write(np.zeros((1 if self._layout == "mono" else 2, 1), np.float32))
        self._container.mux(self._track.encode(None))
        self._container.close()


def _find_options(samples: npt.NDArray[np.float32], sample_rate_hz: int, *, encoding: Encoding) -> dict[str, Any]:
    """Return the libsndfile options that give a file its bit rate. For Vorbis they depend on `samples` (S, C)."""
    if (bitrate_kbps := encoding.bitrate_kbps) is not None:
        match encoding.file_format:
            case AudioFormat.MP3:
                return {"bitrate_mode": "CONSTANT", "compression_level": mp3_level(bitrate_kbps, sample_rate_hz)}
            case AudioFormat.OPUS:
                low, high = _OPUS_KBPS
                level = (high - (bitrate_kbps - _OGG_KBPS) / samples.shape[1]) / (high - low)
                return {"compression_level": min(max(level, 0.0), 1.0)}
            case AudioFormat.OGG:
                return {"compression_level": _find_vorbis_level(samples, sample_rate_hz, bitrate_kbps=bitrate_kbps)}
    return {}


def _write(file: SoundFile, samples: npt.NDArray[Any]) -> None:
    for start in range(0, len(samples), _BLOCK):
        file.write(samples[start : start + _BLOCK])


def _find_vorbis_level(samples: npt.NDArray[np.float32], sample_rate_hz: int, *, bitrate_kbps: int) -> float:
    """Return the libsndfile compression level at which a Vorbis file has the bit rate `bitrate_kbps`.

    libsndfile has no option for the bit rate of Vorbis, and the bit rate at a compression level depends on the audio.
    So this function encodes the audio at several levels. From long audio, it encodes only short excerpts.
    """
    size = _VORBIS_EXCERPT_S * sample_rate_hz
    if len(samples) > _VORBIS_EXCERPTS * size:
        starts = np.linspace(0, len(samples) - size, _VORBIS_EXCERPTS).astype(int)
        samples = np.concatenate([samples[start : start + size] for start in starts])
    empty = _vorbis_bytes(samples[:0], sample_rate_hz, level=0.5)
    low, high = 0.0, 1.0  # the bit rate is highest at level 0
    for _ in range(_VORBIS_TRIES):
        level = (low + high) / 2
        num_bytes = _vorbis_bytes(samples, sample_rate_hz, level=level) - empty
        ratio = num_bytes * 8 * sample_rate_hz / (max(len(samples), 1) * bitrate_kbps * 1000)
        if abs(ratio - 1) <= _VORBIS_TOLERANCE:
            return level
        low, high = (level, high) if ratio > 1 else (low, level)
    return (low + high) / 2


def _vorbis_bytes(samples: npt.NDArray[np.float32], sample_rate_hz: int, *, level: float) -> int:
    import soundfile

    stream, (container, subtype) = io.BytesIO(), _SUBTYPES[AudioFormat.OGG]
    form = {"format": container, "subtype": subtype, "compression_level": level}
    with soundfile.SoundFile(stream, "w", sample_rate_hz, samples.shape[1], **form) as file:
        _write(file, samples)
    return stream.tell()


def _with_length(data: memoryview, *, num_samples: int) -> memoryview:
    """Return the constant-rate MP3 file `data` with an "Info" frame, which states where the audio starts and ends.

    LAME writes this frame only if it fits into a frame of the file's bit rate. Without it, decoders add silence at both
    ends. A file that already has the frame is returned unchanged. The frame has the layout of the Xing header, with
    LAME's extension.
    """
    begin = 10 + from_syncsafe(data[6:10]) if bytes(data[:3]) == b"ID3" else 0  # the size of the tag at the start
    first = bytes(data[begin : begin + 4])
    is_mpeg1 = bool(first[1] & 0x08)
    is_mono = first[3] >> 6 == 3
    start = 4 + (((32, 17) if is_mpeg1 else (17, 9))[is_mono])
    if bytes(data[begin + start : begin + start + 4]) in (b"Info", b"Xing"):
        return data
    samples_per_frame = 1152 if is_mpeg1 else 576
    rate_hz = (44_100, 48_000, 32_000)[first[2] >> 2 & 3] >> (0 if is_mpeg1 else 1 if first[1] & 0x10 else 2)
    sizes, offset = [], begin
    while bytes(data[offset : offset + 1]) == _SYNC:  # an ID3v1 tag may follow the last frame
        kbps = _MP3_KBPS[is_mpeg1][data[offset + 2] >> 4]
        sizes.append(samples_per_frame * kbps * 125 // rate_hz + (data[offset + 2] >> 1 & 1))
        offset += sizes[-1]
    padding = len(sizes) * samples_per_frame - num_samples - _MPEG_DELAY
    tag = b"Info" + struct.pack(">III", 3, len(sizes), 0)  # 3: the numbers of frames and of bytes follow
    tag += b"LAME3.100" + bytes(12) + (_MPEG_DELAY << 12 | max(padding, 0)).to_bytes(3, "big") + bytes(12)
    index, size = next(
        (index, size)
        for index, kbps in enumerate(_MP3_KBPS[is_mpeg1])
        if (size := samples_per_frame * kbps * 125 // rate_hz) >= start + len(tag)
    )
    frame = bytearray(size)
    frame[:4] = first[0], first[1], index << 4 | first[2] & 0x0C, first[3]
    frame[start : start + len(tag)] = tag
    struct.pack_into(">I", frame, start + 12, sum(sizes) + size)
    return memoryview(b"".join((data[:begin], frame, data[begin:])))


def _rewrite_ogg(file: Writable, *, trim_samples: int) -> None:
    """Set a fixed serial number in every page of an Ogg file, and trim `trim_samples` from its end.

    `file` is a file object that can be read and written. libsndfile writes a random serial number, but equal audio must
    give equal bytes. RFC 3533 defines the layout of Ogg pages and their checksum. RFC 7845, section 4.4, defines how
    the end of an Opus file is trimmed.
    """
    start, end = 0, file.seek(0, 2)
    before, before_start = bytearray(), 0
    while start < end:
        file.seek(start)
        page = bytearray(file.read(_OGG_HEADER_BYTES))
        page += file.read(page[26])
        page += file.read(sum(page[_OGG_HEADER_BYTES:]))
        struct.pack_into("<I", page, 14, _OGG_SERIAL)
        if start + len(page) == end and trim_samples:
            length = _granule(page) - trim_samples
            if 0 < length <= _granule(before):  # positions must not decrease, so the page before becomes the last one
                file.truncate(start)
                page, start, end = before, before_start, before_start + len(before)
                page[5] |= _OGG_LAST_PAGE
            struct.pack_into("<q", page, 6, length)
        page[22:26] = bytes(4)
        page[22:26] = _ogg_checksum(page)
        file.seek(start)
        file.write(bytes(page))
        before, before_start = page, start
        start += len(page)


def _granule(page: bytearray) -> int:
    """Return the number of samples from the start of the stream to the end of an Ogg page."""
    granule: int = struct.unpack_from("<q", page, 6)[0]
    return granule


def _ogg_checksum(page: bytearray) -> bytes:
    # Ogg's CRC-32 differs from zlib's in two ways: the bits of every byte and of the result are in reverse order, and
    # the CRC is not inverted at the start and at the end.
    value = zlib.crc32(page.translate(_REVERSED_BITS), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return value.to_bytes(4, "big").translate(_REVERSED_BITS)
