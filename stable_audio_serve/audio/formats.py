"""The properties of output formats: media types, and the allowed bit rates, bit depths and sample rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

from stable_audio_serve.core.errors import InvalidRequestError
from stable_audio_serve.core.sound import AudioFormat, BitDepth, Encoding

SAMPLE_RATES_HZ = (8000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000)
BITRATES_KBPS = (8, 320)
TELEPHONE_RATE_HZ = 8000

_OPUS_RATE_HZ = 48_000
_MP3_RATES_HZ = (8000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000)
# For each sample rate, the lowest bit rate (kbit/s) at which a file may have it. An MP3 file needs MPEG 2 below
# 32 kbit/s, and sounds worse at high sample rates. For Vorbis, these are the lowest bit rates that libsndfile 1.2.2
# reaches, measured with noise in stereo.
_FROM_KBPS = {
    AudioFormat.MP3: {48_000: 32, 44_100: 32, 32_000: 32, 24_000: 24, 22_050: 24, 16_000: 16, 8000: 8},
    AudioFormat.OGG: {48_000: 64, 44_100: 64, 32_000: 64, 24_000: 48, 22_050: 48, 16_000: 40, 8000: 0},
}
# Bit rate in kbit/s -> the factor by which LAME 3.100 multiplies the audio. The nearest bit rate counts, and of two
# equally near ones the lower.
_MP3_FACTORS = {160: 0.95, 192: 0.97, 224: 0.98, 256: 1.0}
_INSTALL = "pip install 'stable-audio-serve[aac]'"


@dataclass(frozen=True, slots=True)
class _Format:
    """The properties of one format."""

    media_type: str
    is_lossy: bool = False
    holds_text: bool = False  # whether a recipe can be embedded
    bit_depths: tuple[BitDepth, ...] = ()
    sample_rates_hz: tuple[int, ...] = SAMPLE_RATES_HZ


_FORMATS: Mapping[AudioFormat, _Format] = {
    AudioFormat.WAV: _Format("audio/wav", holds_text=True, bit_depths=(16, 24, "float")),
    AudioFormat.FLAC: _Format("audio/flac", holds_text=True, bit_depths=(16, 24)),
    AudioFormat.MP3: _Format("audio/mpeg", is_lossy=True, holds_text=True),
    AudioFormat.OGG: _Format("audio/ogg", is_lossy=True, holds_text=True),
    AudioFormat.OPUS: _Format(
        "audio/ogg", is_lossy=True, holds_text=True, sample_rates_hz=(8000, 16_000, 24_000, _OPUS_RATE_HZ)
    ),
    AudioFormat.PCM: _Format("audio/pcm", bit_depths=(16,)),
    AudioFormat.ULAW: _Format("audio/basic", sample_rates_hz=(TELEPHONE_RATE_HZ,)),
    AudioFormat.ALAW: _Format("audio/x-alaw-basic", sample_rates_hz=(TELEPHONE_RATE_HZ,)),
    AudioFormat.M4A: _Format("audio/mp4", is_lossy=True),
    AudioFormat.AAC: _Format("audio/aac", is_lossy=True),
}
TEXT_FORMATS = tuple(name for name, each in _FORMATS.items() if each.holds_text)


def media_type(file_format: AudioFormat) -> str:
    """Return the media type of a format's files."""
    return _FORMATS[file_format].media_type


@cache
def available_formats() -> tuple[AudioFormat, ...]:
    """Return the formats that this installation can write. AAC needs the optional package PyAV."""
    has_aac = find_spec("av") is not None
    return tuple(name for name in AudioFormat if has_aac or not _needs_aac(name))


def media_types() -> tuple[str, ...]:
    """Return the media types of the formats that this installation can write."""
    return tuple(dict.fromkeys(media_type(name) for name in available_formats()))


def _needs_aac(file_format: AudioFormat) -> bool:
    return file_format in (AudioFormat.M4A, AudioFormat.AAC)


def require_format(name: str) -> AudioFormat:
    """Return the format with this name.

    Raises InvalidRequestError if the name is unknown, or if this installation cannot write the format.
    """
    available = available_formats()
    if name in available:
        return AudioFormat(name)
    allowed = ", ".join(available)
    reason = f"{name} is not installed on this server ({_INSTALL})" if name in (*AudioFormat,) else "unknown format"
    raise InvalidRequestError(f"response_format: {reason}; it must be one of {allowed}", field="response_format")


def check_encoding(encoding: Encoding) -> None:
    """Raise InvalidRequestError if the format does not allow the chosen bit rate, bit depth or sample rate.

    The message names the field and its allowed values.
    """
    require_format(encoding.file_format)
    name, allowed = encoding.file_format, _FORMATS[encoding.file_format]
    if encoding.bitrate_kbps is not None:
        if not allowed.is_lossy:
            lossy = [each for each in available_formats() if _FORMATS[each].is_lossy]
            raise _fault("bitrate", f"must be unset for {name}; only {_list(lossy)} have a bit rate")
        low, high = _bitrates(encoding)
        if not low <= encoding.bitrate_kbps <= high:
            where = f" at {encoding.sample_rate_hz} Hz" if encoding.sample_rate_hz else ""
            raise _fault("bitrate", f"must be from {low} to {high} kbit/s for {name}{where}")
    if encoding.bit_depth is not None and encoding.bit_depth not in allowed.bit_depths:
        depths = _list(allowed.bit_depths)
        raise _fault("bit_depth", f"must be {depths} or unset for {name}" if depths else f"must be unset for {name}")
    if encoding.sample_rate_hz is not None and encoding.sample_rate_hz not in allowed.sample_rates_hz:
        raise _fault("sample_rate", f"must be {_list(allowed.sample_rates_hz)} or unset for {name}")


def file_rate(encoding: Encoding, sample_rate_hz: int) -> int:
    """Return the sample rate of a file with this encoding. `sample_rate_hz` is the rate of the audio.

    A rate in `encoding` applies as it is. Otherwise, the file has the rate of the audio if the format allows it, else
    the next higher rate of the format, or if there is none, the format's highest rate. An MP3 or Vorbis file with a low
    bit rate has a lower rate.
    """
    if encoding.sample_rate_hz is not None:
        return encoding.sample_rate_hz
    kbps, rates = encoding.bitrate_kbps, _FROM_KBPS.get(encoding.file_format)
    if kbps is not None and rates is not None:
        sample_rate_hz = min(sample_rate_hz, max(rate for rate, low in rates.items() if kbps >= low))
    match encoding.file_format:
        case AudioFormat.OPUS:
            return _OPUS_RATE_HZ
        case AudioFormat.ULAW | AudioFormat.ALAW:
            return TELEPHONE_RATE_HZ
        case AudioFormat.MP3 | AudioFormat.M4A | AudioFormat.AAC:
            return next((rate for rate in _MP3_RATES_HZ if rate >= sample_rate_hz), _MP3_RATES_HZ[-1])
    return sample_rate_hz


def mp3_level(bitrate_kbps: int, sample_rate_hz: int) -> float:
    """Return libsndfile's compression level, from 0 to below 1, for a constant bit rate of an MP3 file."""
    low, high = _mp3_bitrates(sample_rate_hz)
    return min(max((high - bitrate_kbps) / (high - low), 0.0), 0.9999)  # libsndfile refuses 1


def mp3_factor(bitrate_kbps: int, sample_rate_hz: int) -> float:
    """Return the factor by which LAME multiplies the audio of an MP3 file with a constant bit rate."""
    _, high = _mp3_bitrates(sample_rate_hz)
    return _MP3_FACTORS[min(_MP3_FACTORS, key=lambda kbps: abs(kbps - min(bitrate_kbps, high)))]


def _bitrates(encoding: Encoding) -> tuple[int, int]:
    if encoding.file_format is AudioFormat.MP3 and encoding.sample_rate_hz is not None:
        return _mp3_bitrates(encoding.sample_rate_hz)
    return BITRATES_KBPS


def _mp3_bitrates(sample_rate_hz: int) -> tuple[int, int]:
    """Return the lowest and the highest bit rate of the MPEG version that has this sample rate."""
    if sample_rate_hz >= 32_000:
        return 32, 320
    return (8, 160) if sample_rate_hz >= 16_000 else (8, 64)


def _list(values: Sequence[object]) -> str:
    *first, last = [str(value) for value in values] or [""]
    return f"{', '.join(first)} or {last}" if first else last


def _fault(field: str, message: str) -> InvalidRequestError:
    return InvalidRequestError(f"{field} {message}", field=field)
