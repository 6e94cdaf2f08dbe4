from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
import soundfile

from stable_audio_serve.audio.decode import AudioDecoder, DecodeProcess
from stable_audio_serve.audio.decode_worker import Refused, read
from stable_audio_serve.audio.encode import encode_audio
from stable_audio_serve.audio.formats import TEXT_FORMATS
from stable_audio_serve.core.errors import InvalidUploadError, OverloadedError
from stable_audio_serve.core.sound import AudioFormat, Encoding
from tests.audio_files import make_audio_file
from tests.patience import PATIENCE_S, wait_until

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def decoder() -> Iterator[AudioDecoder]:
    decoder = AudioDecoder()
    yield decoder
    decoder.close()


def as_file(data: bytes | bytearray) -> IO[bytes]:
    file = tempfile.TemporaryFile()  # noqa: SIM115  the test closes it
    file.write(data)
    return file


def claim_flac_samples(samples: int, *, duration_s: float = 1.0) -> bytes:
    """Returns a FLAC file of this duration whose header declares this number of samples."""
    data = bytearray(make_audio_file(container="FLAC", duration_s=duration_s))
    data[21] = data[21] & 0xF0 | samples >> 32
    data[22:26] = (samples & 0xFFFFFFFF).to_bytes(4, "big")
    return bytes(data)


@pytest.mark.parametrize(
    ("container", "subtype"),
    [
        *[("WAV", subtype) for subtype in ("PCM_16", "PCM_24", "PCM_U8", "FLOAT")],
        ("FLAC", "PCM_24"),
        ("MP3", "MPEG_LAYER_III"),
        ("OGG", "VORBIS"),
        ("OGG", "OPUS"),
        ("AIFF", "PCM_16"),
        ("CAF", "ALAC_16"),
        ("AU", "PCM_16"),
        ("RF64", "PCM_16"),
        ("W64", "PCM_16"),
    ],
)
def test_every_format_is_read_completely(decoder: AudioDecoder, container: str, subtype: str) -> None:
    data = make_audio_file(container=container, subtype=subtype, rate_hz=48000)
    source = decoder.decode(as_file(data), max_s=60)
    expected, rate_hz = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    assert source.sample_rate_hz == rate_hz == 48000
    assert source.samples.dtype == np.float32
    assert source.samples.flags.c_contiguous
    np.testing.assert_array_equal(source.samples, expected.T)


@pytest.mark.parametrize(("channels", "kept"), [(1, 1), (2, 2), *((channels, 2) for channels in range(3, 9))])
def test_up_to_eight_channels_are_mixed_down_to_two(decoder: AudioDecoder, channels: int, kept: int) -> None:
    source = decoder.decode(as_file(make_audio_file(channels=channels)), max_s=60)
    mono = decoder.decode(as_file(make_audio_file(channels=1)), max_s=60)
    assert source.samples.shape == (kept, 44100)
    # The channels are all equal, so each channel of the mix must equal the mono file.
    np.testing.assert_allclose(source.samples, np.tile(mono.samples, (kept, 1)), atol=1e-6)


SIDE = 0.5**0.5  # gain of all channels except front left and right


def make_surround_file(loud: int, *, channels: int, container: str, subtype: str | None = None, mask: int = 0) -> bytes:
    """Returns a file with a 200 Hz tone in one channel. `mask` replaces the channel mask of a WAVEX file."""
    audio = np.zeros((9600, channels), dtype=np.float32)
    audio[:, loud] = 0.5 * np.sin(2 * np.pi * 200 * np.arange(9600) / 48_000)
    stream = io.BytesIO()
    soundfile.write(stream, audio, 48_000, format=container, subtype=subtype)
    data = bytearray(stream.getvalue())
    if mask:
        at = data.index(b"fmt ") + 28
        data[at : at + 4] = mask.to_bytes(4, "little")
    return bytes(data)


@pytest.mark.parametrize(
    ("gains", "layout"),
    [
        ([(1, 0), (0, 1), (SIDE, SIDE), (0, 0), (SIDE, 0), (0, SIDE)], {"container": "WAV"}),
        ([(1, 0), (SIDE, SIDE), (0, 1), (SIDE, 0), (0, SIDE), (0, 0)], {"container": "OGG", "subtype": "VORBIS"}),
        ([(1, 0), (SIDE, SIDE), (0, 1), (SIDE, 0), (0, SIDE), (0, 0)], {"container": "OGG", "subtype": "OPUS"}),
        # 4.0 (back centre) and 2.1, which only the channel mask of the file tells from quadraphonic and 3.0.
        ([(1, 0), (0, 1), (SIDE, SIDE), (SIDE, SIDE)], {"container": "WAVEX", "mask": 0x107}),
        ([(1, 0), (0, 1), (0, 0)], {"container": "WAVEX", "mask": 0xB}),
    ],
    ids=["wav", "vorbis", "opus", "4.0", "2.1"],
)
def test_each_surround_speaker_keeps_its_side(
    decoder: AudioDecoder, gains: list[tuple[float, float]], layout: dict[str, Any]
) -> None:
    total = sum(left for left, _ in gains)
    found = []
    for loud in range(len(gains)):
        data = make_surround_file(loud, channels=len(gains), **layout)
        source = decoder.decode(as_file(data), max_s=1)
        found.append(tuple(np.abs(source.samples[:, 2400:7200]).max(axis=1) / 0.5 * total))
    np.testing.assert_allclose(found, gains, atol=0.1)  # Vorbis and Opus change the level a little


def test_a_flac_file_of_unknown_length_is_read_completely(decoder: AudioDecoder) -> None:
    # An encoder that writes to a pipe cannot go back to fill in the number of samples.
    file = as_file(claim_flac_samples(0))
    expected = decoder.decode(as_file(make_audio_file(container="FLAC")), max_s=60).samples
    np.testing.assert_array_equal(decoder.decode(file, max_s=60).samples, expected)
    assert decoder.decode(file, max_s=0.5).samples.shape == (2, 22_051)
    with pytest.raises(InvalidUploadError, match=r"from 2 to 3 seconds, not 1\.00"):
        decoder.decode(file, max_s=60, allowed_s=(2, 3))


def test_unknown_length_is_counted_only_as_far_as_it_matters(decoder: AudioDecoder) -> None:
    data = bytearray(claim_flac_samples(0, duration_s=40))
    data[-len(data) // 8] ^= 0xFF  # damage that is noticed only if this part is decoded
    assert decoder.decode(as_file(data), max_s=2).samples.shape == (2, 2 * 44100 + 1)
    with pytest.raises(InvalidUploadError, match=r"from 2 to 3 seconds, not [0-9.]+ or more"):
        decoder.decode(as_file(data), max_s=2, allowed_s=(2, 3))
    with pytest.raises(InvalidUploadError, match="cannot be decoded"):
        decoder.decode(as_file(data), max_s=60)


def test_an_mp3_file_of_variable_rate_needs_no_header(decoder: AudioDecoder) -> None:
    """An encoder that writes to a pipe cannot add the Xing header. libsndfile then expects 0.6 instead of 2 seconds."""
    tagged = make_audio_file(container="MP3", duration_s=2.0)
    file = as_file(tagged.replace(b"Xing", bytes(4)) + b"TAG".ljust(128, b"\0"))  # an ID3v1 tag at the end
    expected = decoder.decode(as_file(tagged), max_s=60).samples
    found = decoder.decode(file, max_s=60).samples
    delay = 1152 + 1105  # samples: the header's frame, and the delay of encoder and decoder, which the header states
    np.testing.assert_allclose(found[:, delay : delay + 88_200], expected, atol=1e-6)
    assert decoder.decode(file, max_s=1.5).samples.shape == (2, 66_151)


@pytest.mark.parametrize(
    ("upload", "words"),
    [
        (make_audio_file(rate_hz=7999), "8000..192000"),
        (make_audio_file(rate_hz=192_001, duration_s=0.1), "8000..192000"),
        (make_audio_file(channels=9, duration_s=0.1), "1 to 8"),
        (claim_flac_samples(2**36 - 1), "more than can be decoded"),
        (claim_flac_samples(2**30 + 1), "more than can be decoded"),
        (make_audio_file(container="SVX", channels=1), "allowed: WAV"),
        (make_audio_file(container="WAV")[:8] + b"AVI " + bytes(100), "allowed: WAV"),
        (b"\xff\xf1" + bytes(100), "allowed: WAV"),  # AAC
        (b"ID3\x04\x00\x00" + b"\x7f" * 4 + make_audio_file(container="MP3"), "cannot be decoded"),
    ],
)
def test_a_bad_header_is_refused(decoder: AudioDecoder, upload: bytes, words: str) -> None:
    with pytest.raises(InvalidUploadError, match=words):
        decoder.decode(as_file(upload), max_s=60)


@pytest.mark.parametrize("rate_hz", [8000, 192_000])
def test_the_limits_of_the_rate_range_are_accepted(decoder: AudioDecoder, rate_hz: int) -> None:
    source = decoder.decode(as_file(make_audio_file(rate_hz=rate_hz, duration_s=0.5)), max_s=60)
    assert (source.sample_rate_hz, source.samples.shape) == (rate_hz, (2, rate_hz // 2))


def test_too_long_audio_is_refused_instead_of_cut() -> None:
    with tempfile.TemporaryFile() as file:
        file.write(make_audio_file(duration_s=2.0, rate_hz=8000))
        file.flush()
        with pytest.raises(Refused, match="at 8000 Hz it must not be longer than 1 s"):
            read(file.fileno(), max_s=60, max_values=2 * 8000, own_rates_hz=())
        samples, _ = read(file.fileno(), max_s=0.5, max_values=2 * 8000, own_rates_hz=())
    assert samples.shape == (4001, 2)


@pytest.mark.parametrize("container", ["FLAC", "OGG", "MP3", "AIFF", "CAF", "AU", "W64", "RF64", "WAV"])
def test_a_truncated_file_is_read_as_far_as_possible_or_refused(decoder: AudioDecoder, container: str) -> None:
    data = make_audio_file(container=container)
    try:
        samples = decoder.decode(as_file(data[: len(data) // 2]), max_s=60).samples
    except InvalidUploadError as error:
        assert "cannot be decoded" in error.message  # noqa: PT017  success is valid too
    else:
        assert 10_000 < samples.shape[1] < 30_000


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_an_ogg_file_that_lacks_a_page_is_refused(decoder: AudioDecoder, subtype: str) -> None:
    """libsndfile would leave out the page, and everything after it would be too early."""
    pages = make_audio_file(container="OGG", subtype=subtype, rate_hz=48_000, duration_s=4.0).split(b"OggS")
    del pages[-2]
    with pytest.raises(InvalidUploadError, match="audio: the audio is damaged"):
        decoder.decode(as_file(b"OggS".join(pages)), max_s=60)


@pytest.mark.parametrize("file_format", TEXT_FORMATS)
def test_the_process_reads_a_files_text(decoder: AudioDecoder, file_format: AudioFormat) -> None:
    audio, text = np.zeros((1, 480), dtype=np.float32), '{"a":"' + "x" * 30_000 + '"}'
    tagged, plain = (encode_audio(audio, 48_000, encoding=Encoding(file_format), text=given) for given in (text, None))
    assert decoder.read_text(as_file(tagged.to_bytes())) == text
    assert decoder.read_text(as_file(plain.to_bytes())) is None
    with pytest.raises(InvalidUploadError, match=r"audio: (not an audio file|the audio cannot be decoded)"):
        decoder.read_text(as_file(tagged.to_bytes()[:20]))


def test_a_too_long_text_is_refused_by_field(decoder: AudioDecoder) -> None:
    audio = np.zeros((1, 480), dtype=np.float32)
    file = encode_audio(audio, 48_000, encoding=Encoding(AudioFormat.FLAC), text="{" * 1_048_577).to_bytes()
    with pytest.raises(InvalidUploadError, match="file: the text in the file is longer than 1048576 bytes"):
        decoder.read_text(as_file(file), field="file")


def test_a_chain_of_ogg_files_is_read_at_one_rate(decoder: AudioDecoder) -> None:
    chain = make_audio_file(container="OGG") + make_audio_file(container="OGG", rate_hz=22050, channels=1)
    source = decoder.decode(as_file(chain), max_s=60)
    assert (source.sample_rate_hz, source.samples.shape) == (44100, (2, 44100))


def test_only_the_requested_seconds_are_read(decoder: AudioDecoder) -> None:
    source = decoder.decode(as_file(make_audio_file(duration_s=30, rate_hz=8000)), max_s=2.5)
    assert source.samples.shape == (2, 20_001)


def test_a_long_mp3_is_read_only_to_the_limit(decoder: AudioDecoder) -> None:
    minute = make_audio_file(duration_s=60, rate_hz=8000, channels=1, container="MP3", subtype="MPEG_LAYER_III")
    file = as_file(minute * 60)
    source = decoder.decode(file, max_s=10)
    assert source.samples.shape == (1, 80_001)
    assert os.lseek(file.fileno(), 0, os.SEEK_CUR) < len(minute)  # less than one of the sixty minutes was read


@pytest.mark.parametrize("data", [b"", b"x", b"not audio at all", b"RIFF", make_audio_file()[:44]])
def test_files_that_are_not_audio_are_refused_by_field(decoder: AudioDecoder, data: bytes) -> None:
    with pytest.raises(InvalidUploadError) as caught:
        decoder.decode(as_file(data), max_s=10, field="audio_file")
    assert caught.value.field == "audio_file"
    assert "audio_file" in caught.value.message


def decoders_of(parent: int) -> set[int]:
    """Returns the ids of the decoder processes that the process `parent` has started."""
    pids = set()
    for children in Path(f"/proc/{parent}/task").glob("*/children"):
        with suppress(OSError):  # the thread or process may have ended since it was listed
            pids |= {p for p in map(int, children.read_text().split()) if b"decode_worker" in read_command_line(p)}
    return pids


def read_command_line(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


@pytest.fixture
def own_pids() -> Callable[[], list[int]]:
    """Returns a function that returns the ids of the decoder processes that this test has started."""
    others = decoders_of(os.getpid())
    return lambda: sorted(decoders_of(os.getpid()) - others)


def test_a_crash_affects_one_file_only(own_pids: Callable[[], list[int]]) -> None:
    decoder = AudioDecoder()
    decoder.decode(as_file(make_audio_file()), max_s=10)
    first = own_pids()
    os.kill(first[0], signal.SIGKILL)
    os.waitid(os.P_PID, first[0], os.WEXITED | os.WNOWAIT)
    assert decoder.decode(as_file(make_audio_file()), max_s=10).samples.shape == (2, 44100)
    assert own_pids() != first
    decoder.close()


def test_a_killed_process_is_replaced_and_the_file_read(own_pids: Callable[[], list[int]]) -> None:
    decoder = AudioDecoder()
    decoder.decode(as_file(make_audio_file()), max_s=10)
    (pid,) = own_pids()
    os.kill(pid, signal.SIGSTOP)
    threading.Timer(0.3, os.kill, (pid, signal.SIGKILL)).start()
    assert decoder.decode(as_file(make_audio_file()), max_s=10).samples.shape == (2, 44100)
    assert own_pids() != [pid]
    decoder.close()


def test_a_file_that_kills_every_process_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[int] = []
    start = DecodeProcess.start

    def start_two_doomed() -> DecodeProcess:
        worker = start()
        if len(killed) == 2:
            return worker
        os.kill(worker.process.pid, signal.SIGSTOP)
        threading.Timer(0.1, os.kill, (worker.process.pid, signal.SIGKILL)).start()
        killed.append(worker.process.pid)
        return worker

    monkeypatch.setattr(DecodeProcess, "start", start_two_doomed)
    decoder = AudioDecoder()
    with pytest.raises(InvalidUploadError, match="audio: decoding the file failed"):
        decoder.decode(as_file(make_audio_file()), max_s=10)
    assert len(killed) == 2
    assert decoder.decode(as_file(make_audio_file()), max_s=10).samples.shape == (2, 44100)
    decoder.close()


def test_failing_to_start_a_process_is_an_overload(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = AudioDecoder()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", "/bin/false")
        with pytest.raises(OverloadedError, match="audio") as caught:
            decoder.decode(as_file(make_audio_file()), max_s=10)
    assert caught.value.retry_after_s
    assert decoder.decode(as_file(make_audio_file()), max_s=10).samples.shape == (2, 44100)
    decoder.close()


def test_files_are_read_where_memory_cannot_be_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process runs with a `setrlimit` like that of macOS."""
    (tmp_path / "sitecustomize.py").write_text(
        "import resource\n"
        "set_limit = resource.setrlimit\n"
        "def refuse(kind, limits):\n"
        "    if kind == resource.RLIMIT_AS: raise ValueError('current limit exceeds maximum limit')\n"
        "    set_limit(kind, limits)\n"
        "resource.setrlimit = refuse\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    decoder = AudioDecoder()
    assert decoder.decode(as_file(make_audio_file()), max_s=10).samples.shape == (2, 44100)
    decoder.close()


@pytest.mark.server
def test_a_file_that_takes_too_long_is_refused(own_pids: Callable[[], list[int]]) -> None:
    decoder = AudioDecoder(timeout_s=PATIENCE_S)
    decoder.decode(as_file(make_audio_file()), max_s=10)
    (pid,) = own_pids()
    os.kill(pid, signal.SIGSTOP)
    decoder._timeout_s = 0.5  # only while the process stands still, because its start may take longer
    with pytest.raises(InvalidUploadError, match="too long"):
        decoder.decode(as_file(make_audio_file()), max_s=10)
    decoder._timeout_s = PATIENCE_S
    assert decoder.decode(as_file(make_audio_file()), max_s=10).samples.shape == (2, 44100)
    decoder.close()


@pytest.mark.server
def test_the_process_ends_with_its_parent() -> None:
    script = (
        "import tempfile, os\n"
        "from stable_audio_serve.audio.decode import AudioDecoder\n"
        "decoder = AudioDecoder()\n"
        "file = tempfile.TemporaryFile(); file.write(b'x')\n"
        "try: decoder.decode(file, max_s=1)\n"
        "except Exception: print('decoded', flush=True)\n"
        "input()\n"
        "os._exit(0)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "decoded\n"
        (pid,) = decoders_of(parent.pid)
        parent.communicate("\n")
    wait_until(lambda: not os.path.exists(f"/proc/{pid}"))


@pytest.mark.server
def test_the_process_starts_quickly_without_heavy_packages() -> None:
    script = "import sys, stable_audio_serve.audio.decode_worker; print(sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    for package in ("torch", "ray", "fastapi", "pydantic", "transformers"):
        assert f"'{package}'" not in loaded


def test_a_served_models_rate_is_always_accepted() -> None:
    file = as_file(make_audio_file(rate_hz=1000))
    usual, with_own = AudioDecoder(), AudioDecoder(own_rates_hz={1000})
    with pytest.raises(InvalidUploadError, match="1000 Hz"):
        usual.decode(file, max_s=2.0)
    assert with_own.decode(file, max_s=2.0).sample_rate_hz == 1000
    usual.close()
    with_own.close()
