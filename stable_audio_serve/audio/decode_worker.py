"""The process that reads untrusted audio files. `audio.decode` starts it with `python -m` and uses it over a socket.

It imports little and limits its own memory. If it crashes, its parent starts another one.

The parent sends a file descriptor and, as JSON, the arguments of `read`, or null to call `read_text`. The response is a
line of JSON with `num_bytes`, followed by that many bytes: float32 (samples, channels), or the text in UTF-8. If the
file cannot be used, the line has the reason as `refused`, and no bytes follow.
"""

from __future__ import annotations

import io
import json
import os
import resource
import socket
import sys
from collections.abc import Collection
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from stable_audio_serve.audio.embedded_text import extract

if TYPE_CHECKING:
    import numpy.typing as npt

_BLOCK_VALUES = 1 << 18
_MEMORY_BYTES = 2 << 30
_NICENESS = 5  # a lower priority than the processes that serve requests on the same cores
_RATES_HZ = (8_000, 192_000)
_MAX_LEVEL = 1_000.0  # largest accepted sample, as a multiple of full scale
_MAX_FILE_VALUES = 1 << 31  # largest samples x channels of a file by its header: 3 h of stereo at 96 kHz
_FORMATS = "WAV, FLAC, MP3, Ogg (Vorbis, Opus), AIFF, CAF, AU, W64 or RF64"
_CONTAINERS = frozenset({"WAV", "WAVEX", "RF64", "W64", "AIFF", "CAF", "AU", "FLAC", "OGG", "MP3"})
_MAGIC = (b"fLaC", b"OggS", b".snd", b"caff", b"ID3", b"riff\x2e\x91\xcf\x11\xa5\xd6\x28\xdb")
_RIFF_FORMS = frozenset({(b"RIFF", b"WAVE"), (b"RF64", b"WAVE"), (b"FORM", b"AIFF"), (b"FORM", b"AIFC")})

_UNKNOWN_FRAMES = (1 << 63) - 1  # libsndfile's number of frames for a FLAC file that was written to a pipe

# The speaker of each channel, for each number of channels from 3 to 8: L is front left, R front right, l another one on
# the left, r on the right and c in the middle. "-" is the low-frequency channel, which the mix leaves out.
_WAV_SPEAKERS = {3: "LRc", 4: "LRlr", 5: "LRclr", 6: "LRc-lr", 7: "LRc-clr", 8: "LRc-lrlr"}
_OGG_SPEAKERS = {3: "LcR", 4: "LRlr", 5: "LcRlr", 6: "LcRlr-", 7: "LcRlrc-", 8: "LcRlrlr-"}  # Vorbis and Opus
# The speaker of each number in a channel map: libsndfile's SF_CHANNEL_MAP_LEFT is 2, and SF_CHANNEL_MAP_LFE is 11. It
# reads the map from a file's channel mask (WAVE_FORMAT_EXTENSIBLE) or layout (CAF).
_MAPPED_SPEAKERS = "ccLRcLRcclr-lrlrclrclrc"
_GET_CHANNEL_MAP = 0x1100  # libsndfile's command SFC_GET_CHANNEL_MAP_INFO
_SURROUND_GAIN = 0.5**0.5  # gain of all channels except front left and right, from ITU-R BS.775


class Refused(Exception):
    """The file cannot be used. The message is safe to show to a client."""


def sniff(head: bytes) -> None:
    """Raise Refused unless `head`, the first bytes of a file, belongs to a supported format."""
    if not head:
        raise Refused("the file is empty")
    # An MPEG frame: 11 set bits, then a valid version and layer (layer 0 is AAC).
    is_mpeg = len(head) > 1 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0 and head[1] & 0x18 != 0x08 and head[1] & 0x06
    if not is_mpeg and not head.startswith(_MAGIC) and (head[:4], head[8:12]) not in _RIFF_FORMS:
        raise Refused(f"not an audio file that can be decoded; allowed: {_FORMATS}")


def read(
    descriptor: int,
    *,
    max_s: float,
    max_values: int,
    own_rates_hz: Collection[int],
    allowed_s: tuple[float, float] | None = None,
) -> tuple[npt.NDArray[np.float32], int]:
    """Return the first `max_s` seconds as (samples, channels) float32, mono or stereo, and the rate in Hz.

    `own_rates_hz` are the served models' sample rates. They are always accepted, so that every generated file can be
    used as input. `allowed_s` is the shortest and the longest duration of a file in seconds. Raises Refused.
    """
    import soundfile

    sniff(os.pread(descriptor, 16, 0))
    try:
        with _open(descriptor) as file:
            low_hz, high_hz = _RATES_HZ
            if file.samplerate not in own_rates_hz and not low_hz <= file.samplerate <= high_hz:
                raise Refused(f"the sample rate {file.samplerate} Hz is outside {low_hz}..{high_hz} Hz")
            _check_format(file.format, channels=file.channels)
            is_known, limit = file.frames != _UNKNOWN_FRAMES, int(max_s * file.samplerate) + 1
            most = limit if allowed_s is None else max(limit, int(allowed_s[1] * file.samplerate) + 1)
            num_frames = file.frames if is_known else _count_frames(file, most)
            if is_known and num_frames * file.channels > _MAX_FILE_VALUES:
                raise Refused(f"it has {num_frames} samples of {file.channels} channels, more than can be decoded")
            duration_s = num_frames / file.samplerate
            if allowed_s is not None and not allowed_s[0] <= duration_s <= allowed_s[1]:
                found = f"{duration_s:.2f}" if is_known or num_frames < most else f"{duration_s:.2f} or more"
                raise Refused(f"must last from {allowed_s[0]:g} to {allowed_s[1]:g} seconds, not {found}")
            longest = max_values // min(file.channels, 2)
            if min(limit, num_frames) > longest:
                raise Refused(f"at {file.samplerate} Hz it must not be longer than {longest // file.samplerate} s")
            samples = _read_blocks(file, min(limit, longest))
            if file.format == "MP3" and len(samples) == num_frames:
                with suppress(soundfile.LibsndfileError), _open(_Prolonged(descriptor, closefd=False)) as whole:
                    if whole.frames > num_frames:  # the number was only an estimate
                        samples = _read_blocks(whole, min(limit, longest))
            # Only for Ogg: the audio after a damaged page would be too early. A cut MP3 is only shorter than it claims.
            if file.format == "OGG" and len(samples) < min(limit, longest, num_frames):
                raise Refused("the audio is damaged: a part of it cannot be decoded")
            return samples, file.samplerate
    except soundfile.LibsndfileError as error:
        raise Refused("the audio cannot be decoded") from error


class _Prolonged(io.FileIO):
    """A file that claims to be 32 times as long.

    libsndfile reads only as many samples as it expects. For an MP3 file without the Xing header, it computes this
    number from the sizes of the file and of the first frame, so it would stop early if the other frames are smaller.
    """

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        position = super().seek(offset, whence)
        return super().seek(32 * position) if (offset, whence) == (0, os.SEEK_END) else position


def _open(source: int | _Prolonged) -> Any:
    """Return a soundfile.SoundFile that reads a file from its start. Raises soundfile.LibsndfileError."""
    import soundfile

    class Sequential(soundfile.SoundFile):  # type: ignore[misc]
        def seekable(self) -> bool:
            return False  # otherwise soundfile seeks after each read, which fails if the length is unknown

    os.lseek(source if isinstance(source, int) else source.fileno(), 0, os.SEEK_SET)
    return Sequential(source, closefd=False)


def _count_frames(file: Any, most: int) -> int:
    """Return the number of frames (samples per channel) of `file`, or of its first blocks with at least `most` frames.

    Counting means decoding. A file of 1 MB can have hours of silence, which would take up to 20 s, and meanwhile no
    other upload could be decoded.
    """
    num_frames = 0
    block = np.empty((_BLOCK_VALUES // file.channels, file.channels), dtype=np.float32)
    while num_frames < most and (num_read := len(file.read(out=block))):
        num_frames += num_read
    file.seek(0)
    return num_frames


def read_text(descriptor: int) -> str | None:
    """Return the text embedded in a file, see `embedded_text.extract`. Raises Refused."""
    sniff(os.pread(descriptor, 16, 0))
    with os.fdopen(descriptor, "rb", closefd=False) as file:
        try:
            return extract(file)
        except ValueError as error:
            raise Refused(str(error)) from error


def _check_format(container: str, *, channels: int) -> None:
    """Raise Refused for a container or a number of channels that is not supported."""
    if container not in _CONTAINERS:
        raise Refused(f"{container} files are not accepted; allowed: {_FORMATS}")
    if not 1 <= channels <= max(_WAV_SPEAKERS):
        raise Refused(f"{channels} channels; allowed: 1 to {max(_WAV_SPEAKERS)}")


def _speakers_of(file: Any) -> str:
    """Return the speaker of each channel of a file with more than two channels."""
    from soundfile import _ffi, _snd  # soundfile has no function for channel maps

    found = _ffi.new("int[]", file.channels)
    if _snd.sf_command(file._file, _GET_CHANNEL_MAP, found, _ffi.sizeof(found)):
        speakers = "".join(_MAPPED_SPEAKERS[number] for number in found if number < len(_MAPPED_SPEAKERS))
        if len(speakers) == file.channels and set(speakers) & set("Llc") and set(speakers) & set("Rrc"):
            return speakers
    return (_OGG_SPEAKERS if file.subtype in ("VORBIS", "OPUS") else _WAV_SPEAKERS)[file.channels]


def _mix_matrix(speakers: str) -> npt.NDArray[np.float32]:
    """Return the gain of each channel in the left and right output, (channels, 2).

    Each column sums to 1, so that the peak of the mix is not higher than the peak of the channels.
    """
    gains = np.array([[speaker in "Llc", speaker in "Rrc"] for speaker in speakers], dtype=np.float32)
    gains[[speaker not in "LR" for speaker in speakers]] *= _SURROUND_GAIN
    normal: npt.NDArray[np.float32] = gains / gains.sum(axis=0)
    return normal


def _read_blocks(file: Any, limit: int) -> npt.NDArray[np.float32]:
    """Read up to `limit` frames (samples per channel) as (frames, channels) float32, mono or stereo. Raises Refused."""
    blocks: list[npt.NDArray[np.float32]] = []
    matrix = _mix_matrix(_speakers_of(file)) if file.channels > 2 else None
    left = limit
    while left > 0:
        block = file.read(min(left, _BLOCK_VALUES // file.channels), dtype="float32", always_2d=True)
        if not len(block):
            break
        if not np.isfinite(block).all():
            raise Refused("the audio has samples that are not finite numbers")
        if np.abs(block).max() > _MAX_LEVEL:
            raise Refused(f"the audio has samples beyond {_MAX_LEVEL:g} times full scale")
        blocks.append(block if matrix is None else block @ matrix)
        left -= len(block)
    if not blocks:
        raise Refused("the file holds no audio")
    return np.concatenate(blocks)


def _answer(descriptor: int, limits: dict[str, Any] | None) -> tuple[dict[str, Any], bytes | memoryview]:
    """Return the response to a message of the parent, and the bytes to send after the response. Raises Refused."""
    if limits is None:
        text = read_text(descriptor)
        return {"has_text": text is not None}, (text or "").encode()
    samples, rate_hz = read(descriptor, **limits)
    answer = {"frames": samples.shape[0], "channels": samples.shape[1], "rate_hz": rate_hz}
    return answer, np.ascontiguousarray(samples).data.cast("B")


def main() -> None:
    """Answer messages on the socket whose descriptor is the first argument, until the parent closes it."""
    with suppress(ValueError):  # macOS has no such limit; elsewhere, a lower one is set already
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.nice(_NICENESS)
    channel = socket.socket(fileno=int(sys.argv[1]))
    channel.sendall(b"ready\n")
    while True:
        message, descriptors, _, _ = socket.recv_fds(channel, 4096, 1)
        if not message:
            return
        payload: bytes | memoryview = b""
        try:
            answer, payload = _answer(descriptors[0], json.loads(message))
        except Refused as error:
            answer = {"refused": str(error)}
        except MemoryError:
            answer = {"refused": "the audio needs too much memory to decode"}
        finally:
            os.close(descriptors[0])
        channel.sendall(json.dumps(answer | {"num_bytes": len(payload)}).encode() + b"\n")
        channel.sendall(payload)


if __name__ == "__main__":
    main()
