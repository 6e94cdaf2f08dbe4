from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import IO

import numpy as np
import pytest
import soundfile

from stable_audio_serve.audio.decode import AudioDecoder
from stable_audio_serve.core.errors import InvalidUploadError
from tests.audio_files import make_audio_file


@pytest.fixture(scope="module")
def decoder() -> Iterator[AudioDecoder]:
    decoder = AudioDecoder()
    yield decoder
    decoder.close()


def as_file(data: bytes) -> IO[bytes]:
    file = tempfile.TemporaryFile()  # noqa: SIM115  closed with the test
    file.write(data)
    return file


@pytest.mark.parametrize(
    ("container", "subtype"),
    [
        *[("WAV", subtype) for subtype in ("PCM_16", "PCM_24", "PCM_U8", "FLOAT")],
        *[("FLAC", "PCM_24"), ("MP3", "MPEG_LAYER_III"), ("OGG", "VORBIS"), ("OGG", "OPUS")],
        *[("AIFF", "PCM_16"), ("CAF", "ALAC_16"), ("AU", "PCM_16"), ("RF64", "PCM_16"), ("W64", "PCM_16")],
    ],
)
def test_every_format_is_read_whole(decoder: AudioDecoder, container: str, subtype: str) -> None:
    data = make_audio_file(container=container, subtype=subtype, rate_hz=48000)
    source = decoder.decode(as_file(data), max_s=60)
    expected, rate_hz = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    assert source.sample_rate_hz == rate_hz == 48000
    assert source.samples.dtype == np.float32
    assert source.samples.flags.c_contiguous
    np.testing.assert_array_equal(source.samples, expected.T)


@pytest.mark.parametrize(("channels", "kept"), [(1, 1), (2, 2), (6, 2)])
def test_at_most_two_channels_are_kept(decoder: AudioDecoder, channels: int, kept: int) -> None:
    source = decoder.decode(as_file(make_audio_file(channels=channels)), max_s=60)
    assert source.samples.shape == (kept, 44100)


def test_only_the_seconds_asked_for_are_read(decoder: AudioDecoder) -> None:
    source = decoder.decode(as_file(make_audio_file(duration_s=30, rate_hz=8000)), max_s=2.5)
    assert source.samples.shape == (2, 20_001)


def test_an_hour_of_mp3_is_bounded(decoder: AudioDecoder) -> None:
    minute = make_audio_file(duration_s=60, rate_hz=8000, channels=1, container="MP3", subtype="MPEG_LAYER_III")
    data = minute * 60
    started_at = time.monotonic()
    source = decoder.decode(as_file(data), max_s=10)
    assert source.samples.shape == (1, 80_001)
    assert time.monotonic() - started_at < 5


@pytest.mark.parametrize("data", [b"", b"x", b"not audio at all", b"RIFF", make_audio_file()[:44]])
def test_what_is_not_audio_is_refused_by_name(decoder: AudioDecoder, data: bytes) -> None:
    with pytest.raises(InvalidUploadError) as caught:
        decoder.decode(as_file(data), max_s=10, field="audio_file")
    assert caught.value.field == "audio_file"
    assert "audio_file" in caught.value.message


def test_a_crash_costs_one_file_only() -> None:
    decoder = AudioDecoder()
    decoder.decode(as_file(make_audio_file()), max_s=10)
    first = decoder.worker_pids()
    os.kill(first[0], signal.SIGKILL)
    time.sleep(0.05)
    assert decoder.decode(as_file(make_audio_file()), max_s=10).samples.shape == (2, 44100)
    assert decoder.worker_pids() != first
    decoder.close()


def test_a_file_that_takes_too_long_is_given_up() -> None:
    decoder = AudioDecoder(timeout_s=0.3)
    decoder.decode(as_file(make_audio_file()), max_s=10)
    (pid,) = decoder.worker_pids()
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(InvalidUploadError, match="too long"):
        decoder.decode(as_file(make_audio_file()), max_s=10)
    assert decoder.decode(as_file(make_audio_file()), max_s=10).samples.shape == (2, 44100)
    decoder.close()


def test_the_process_ends_with_its_parent() -> None:
    script = (
        "import tempfile, os\n"
        "from stable_audio_serve.audio.decode import AudioDecoder\n"
        "decoder = AudioDecoder()\n"
        "file = tempfile.TemporaryFile(); file.write(b'x')\n"
        "try: decoder.decode(file, max_s=1)\n"
        "except Exception: print(decoder.worker_pids()[0], flush=True)\n"
        "os._exit(0)\n"
    )
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    deadline_at = time.monotonic() + 5
    while os.path.exists(f"/proc/{int(output.stdout)}") and time.monotonic() < deadline_at:
        time.sleep(0.02)
    assert not os.path.exists(f"/proc/{int(output.stdout)}")


def test_the_process_starts_quickly_and_knows_no_heavy_package() -> None:
    script = "import sys, stable_audio_serve.audio.decode_worker; print(sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    for package in ("torch", "ray", "fastapi", "pydantic", "transformers"):
        assert f"'{package}'" not in loaded
