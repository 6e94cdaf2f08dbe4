"""Malicious uploads are refused with the name of the form field. Misleading names and types have no effect."""

from __future__ import annotations

import io
import struct

import httpx
import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.audio_files import make_audio_file
from tests.backends import ToneBackend

VARIATIONS = "/v1/audio/variations"
WAV = make_audio_file(duration_s=0.2)


def wav_header(*, rate_hz: int, channels: int, bits: int = 16, tag: int = 1) -> bytes:
    """Returns a WAV header that declares 4 GB of samples. The samples do not follow."""
    size = 4_000_000_000
    frame = channels * bits // 8
    fmt = struct.pack("<HHIIHH", tag, channels, rate_hz, min(rate_hz * frame, 2**32 - 1), frame % 65536, bits)
    return (
        b"RIFF"
        + struct.pack("<I", 4_000_000_036)
        + b"WAVEfmt "
        + struct.pack("<I", 16)
        + fmt
        + b"data"
        + struct.pack("<I", size)
    )


def float_wav(*values: float) -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, np.array([values] * 100, dtype=np.float32), 44100, format="WAV", subtype="FLOAT")
    return stream.getvalue()


BAD_UPLOADS = {
    "rate of 1 Hz": make_audio_file(rate_hz=1, duration_s=10),
    "rate of 4 GHz": wav_header(rate_hz=4_000_000_000, channels=1) + bytes(1000),
    "no channels": wav_header(rate_hz=44100, channels=0) + bytes(1000),
    "a thousand channels": wav_header(rate_hz=44100, channels=1000) + bytes(100_000),
    "header only": wav_header(rate_hz=44100, channels=2),
    "unknown codec": wav_header(rate_hz=44100, channels=2, tag=0x55) + bytes(1000),
    "nan samples": float_wav(0.5, float("nan")),
    "infinite samples": float_wav(float("inf"), 0),
    "huge samples": float_wav(1e30, 0),
    "flac header only": make_audio_file(container="FLAC")[:60],
    "ogg header only": make_audio_file(container="OGG", subtype="VORBIS")[:100],
    "noise behind an mp3 sync": b"\xff\xfb\x90\x00" + bytes(range(256)) * 10,
    "id3 without audio": b"ID3\x04\x00\x00\x7f\x7f\x7f\x7f" + bytes(1000),
    "a html page": b"<!doctype html>" + b" " * 1000,
    "a zip": b"PK\x03\x04" + bytes(1000),
    "text": b"RIFF and no more",
}


@pytest.mark.parametrize("name", BAD_UPLOADS)
async def test_bad_upload_is_400_and_names_audio(client: httpx.AsyncClient, name: str) -> None:
    reply = await client.post(VARIATIONS, data={"prompt": "x"}, files={"audio": ("a.wav", BAD_UPLOADS[name])})
    assert reply.status_code == 400, reply.text
    assert "audio" in reply.json()["detail"]


async def test_truncated_wav_is_decoded_as_far_as_possible(client: httpx.AsyncClient, backend: ToneBackend) -> None:
    upload = wav_header(rate_hz=44100, channels=2) + bytes(4 * 1000)
    reply = await client.post(VARIATIONS, data={"prompt": "x", "duration": "0.1"}, files={"audio": upload})
    assert reply.status_code == 200, reply.text
    assert backend.last.init_audio is not None
    assert backend.last.init_audio.samples.shape == (2, 1000)


async def test_flac_bomb_is_decoded_within_limits(client: httpx.AsyncClient, backend: ToneBackend) -> None:
    stream = io.BytesIO()
    with soundfile.SoundFile(stream, "w", 8000, 8, format="FLAC", subtype="PCM_16") as file:
        for _ in range(30):
            file.write(np.zeros((8000 * 60, 8), dtype=np.int16))
    assert len(stream.getvalue()) < 500_000  # the file is small, but its decoded samples take 230 MB
    form = {"prompt": "x", "model": "demo", "duration": "1"}
    reply = await client.post(VARIATIONS, data=form, files={"audio": stream.getvalue()})
    assert reply.status_code == 200, reply.text
    assert backend.last.init_audio is not None
    assert backend.last.init_audio.samples.nbytes < 2_000_000


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, len(WAV) - 1), replacement=st.binary(min_size=1, max_size=8), cut=st.booleans())
async def test_damaged_wav_gets_a_response(
    client: httpx.AsyncClient, position: int, replacement: bytes, cut: bool
) -> None:
    # Damage the header in about half of the examples: in those with a replacement of odd length.
    position = position % 60 if len(replacement) % 2 else position
    damaged = WAV[:position] + replacement + (b"" if cut else WAV[position + len(replacement) :])
    form = {"prompt": "x", "duration": "0.01"}
    reply = await client.post(VARIATIONS, data=form, files={"audio": damaged})
    assert reply.status_code in {200, 400}, reply.text


async def test_longest_prompt_fits_a_form(client: httpx.AsyncClient, backend: ToneBackend) -> None:
    form = {"prompt": "\N{HEADPHONE}" * 100_000, "duration": "0.1"}
    assert (await client.post(VARIATIONS, data=form, files={"audio": WAV})).status_code == 200
    assert backend.requests[-1][1].prompt == form["prompt"]


@pytest.mark.parametrize("path", [VARIATIONS, "/v2beta/audio/stable-audio-2/text-to-audio"])
@pytest.mark.parametrize("end", ["", "\r\n--B", '\r\n--B\r\nContent-Disposition: form-data; name="steps"\r\n\r\n5'])
async def test_a_form_that_is_cut_off_is_refused(
    client: httpx.AsyncClient, backend: ToneBackend, path: str, end: str
) -> None:
    part = '--B\r\nContent-Disposition: form-data; name="{}"\r\n\r\n{}'
    file = b'--B\r\nContent-Disposition: form-data; name="audio"; filename="a.wav"\r\n\r\n' + WAV
    body = b"\r\n".join([file, part.format("prompt", "x").encode(), part.format("duration", 1).encode()])
    headers = {"content-type": "multipart/form-data; boundary=B"}
    reply = await client.post(path, content=body + end.encode(), headers=headers)
    assert (reply.status_code, "body: the form is incomplete" in reply.text) == (400, True), reply.text
    assert backend.requests == []
    assert (await client.post(path, content=body + b"\r\n--B--\r\n", headers=headers)).status_code == 200


async def test_too_large_field_of_a_form_is_named(client: httpx.AsyncClient) -> None:
    form = {"prompt": "x", "negative_prompt": "y" * 600_000}
    reply = await client.post(VARIATIONS, data=form, files={"audio": ("a.wav", WAV)})
    assert reply.status_code == 400
    assert reply.json()["detail"].startswith("body: ")
    assert "negative_prompt" in reply.json()["detail"]
    assert "524288" in reply.json()["detail"]
