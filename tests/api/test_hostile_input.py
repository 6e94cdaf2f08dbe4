"""Whatever arrives, the answer is a JSON error of the client's kind: never a 500, never a hang."""

from __future__ import annotations

import io
import json
import struct

import httpx
import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tests.audio_files import make_audio_file
from tests.backends import ToneBackend

URL = "/v1/audio/generations"
VARIATIONS = "/v1/audio/variations"
JSON = {"content-type": "application/json"}
WAV = make_audio_file(duration_s=0.2)


def expect_client_error(reply: httpx.Response) -> None:
    assert 400 <= reply.status_code < 500, reply.text
    assert reply.json()["detail"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"}",
        b"null",
        b"[]",
        b"1",
        b'"x"',
        b"true",
        b"\x00",
        b"\xff\xfe",
        b"{'prompt': 'x'}",
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "\xff"}',
        b'{"prompt": "x", "seed": 1' + b"0" * 5000 + b"}",
        b'{"prompt": "x", "steps": 1' + b"0" * 400 + b"}",
        b'{"prompt": "x", "a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"prompt": ' + b'{"a":' * 1000 + b"1" + b"}" * 1001,
        b'{"prompt": "x", "duration": 1e400}',
        b'{"prompt": "x", "duration": -0.0}',
        b'{"prompt": "x",}',
        b'{"prompt": "x"} {}',
        '{"prompt": "x", "steps": "\u0663\u0663x"}'.encode(),
        b'{"prompt": "x", "model": "' + b"m" * 10_000 + b'"}',
        b'{"prompt": "x", "model": "small-sfx\\r\\nX-Evil: 1"}',
        b'{"prompt": "x", "sampler_kwargs": {"' + b"k" * 10_000 + b'": [1]}}',
    ],
)
async def test_strange_json(client: httpx.AsyncClient, body: bytes) -> None:
    expect_client_error(await client.post(URL, content=body, headers=JSON))


async def test_json_with_a_byte_order_mark(client: httpx.AsyncClient) -> None:
    body = b'\xef\xbb\xbf{"prompt": "x", "duration": 0.1}'
    assert (await client.post(URL, content=body, headers=JSON)).status_code == 200


async def test_the_longest_prompt_also_fits_a_form(client: httpx.AsyncClient, backend: ToneBackend) -> None:
    form = {"prompt": "\N{HEADPHONE}" * 100_000, "duration": "0.1"}
    assert (await client.post(VARIATIONS, data=form, files={"audio": WAV})).status_code == 200
    assert backend.requests[-1][1].prompt == form["prompt"]


async def test_a_form_field_beyond_all_reason_names_the_body(client: httpx.AsyncClient) -> None:
    reply = await client.post(VARIATIONS, data={"prompt": "x" * 600_000}, files={"audio": WAV})
    assert reply.status_code == 400
    assert reply.json()["detail"].startswith("body: ")


@pytest.mark.parametrize(
    "content_type",
    [
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data",
        "image/png",
        "application/xml",
        "multipart/form-data; boundary=x",
        "application/json-ish",
        "multipart/mixed; boundary=x",
        ";;;",
        "é",
    ],
)
@pytest.mark.parametrize("url", [URL, VARIATIONS, "/v1/audio/inpaint"])
async def test_wrong_content_types(client: httpx.AsyncClient, url: str, content_type: str) -> None:
    headers = [(b"content-type", content_type.encode())]
    expect_client_error(await client.post(url, content=b'{"prompt": "x"}', headers=headers))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"--B",
        b"--B--",
        b"--B\r\n\r\nx",
        b'--B\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nx',
        b"--B\r\nContent-Disposition: form-data\r\n\r\nx\r\n--B--\r\n",
        b"--B\r\nContent-Disposition: ;;;\r\n\r\nx\r\n--B--\r\n",
        b"--B\r\nNo-Colon\r\n\r\nx\r\n--B--\r\n",
        b'--B\r\nContent-Disposition: form-data; name="audio"; filename="a.wav"\r\n\r\n' + WAV,
        b'--B\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n' + b"x" * 600_000 + b"\r\n--B--\r\n",
        b'--B\r\nContent-Disposition: form-data; name="f"\r\n\r\nx\r\n' * 100 + b"--B--\r\n",
        b'--B\r\nContent-Disposition: form-data; name="f"; filename="f"\r\n\r\nx\r\n' * 20 + b"--B--\r\n",
        b"--B\r\n" + b"X-A: b\r\n" * 5000 + b"\r\nx\r\n--B--\r\n",
        b"\x00" * 1000,
    ],
)
async def test_malformed_multipart(client: httpx.AsyncClient, body: bytes) -> None:
    headers = {"content-type": "multipart/form-data; boundary=B"}
    expect_client_error(await client.post(VARIATIONS, content=body, headers=headers))


@pytest.mark.parametrize("charset", ["utf-7", "hex", "idna", "punycode", "nope", "utf-16"])
async def test_odd_form_charsets(client: httpx.AsyncClient, charset: str) -> None:
    body = b'--B\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n+2AA-\xff\r\n--B--\r\n'
    headers = {"content-type": f"multipart/form-data; boundary=B; charset={charset}"}
    expect_client_error(await client.post(VARIATIONS, content=body, headers=headers))


def wav_header(*, rate_hz: int, channels: int, bits: int = 16, tag: int = 1) -> bytes:
    """A header that promises 4 GB."""
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
async def test_bad_uploads_are_400_naming_audio(client: httpx.AsyncClient, name: str) -> None:
    reply = await client.post(VARIATIONS, data={"prompt": "x"}, files={"audio": ("a.wav", BAD_UPLOADS[name])})
    assert reply.status_code == 400, reply.text
    assert "audio" in reply.json()["detail"]


async def test_a_truncated_wav_gives_what_it_has(client: httpx.AsyncClient, backend: ToneBackend) -> None:
    upload = wav_header(rate_hz=44100, channels=2) + bytes(4 * 1000)
    reply = await client.post(VARIATIONS, data={"prompt": "x", "duration": "0.1"}, files={"audio": upload})
    assert reply.status_code == 200, reply.text
    assert backend.last.init_audio is not None
    assert backend.last.init_audio.samples.shape == (2, 1000)


async def test_a_flac_that_unpacks_to_hundreds_of_megabytes(client: httpx.AsyncClient, backend: ToneBackend) -> None:
    stream = io.BytesIO()
    with soundfile.SoundFile(stream, "w", 8000, 8, format="FLAC", subtype="PCM_16") as file:
        for _ in range(30):
            file.write(np.zeros((8000 * 60, 8), dtype=np.int16))
    assert len(stream.getvalue()) < 500_000  # for 230 MB of samples
    form = {"prompt": "x", "model": "demo", "duration": "1"}
    reply = await client.post(VARIATIONS, data=form, files={"audio": stream.getvalue()})
    assert reply.status_code == 200, reply.text
    assert backend.last.init_audio is not None
    assert backend.last.init_audio.samples.nbytes < 2_000_000


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=5,
)
CONTROLS = [
    "prompt",
    "model",
    "negative_prompt",
    "steps",
    "cfg_scale",
    "batch_size",
    "seed",
    "chunked_decode",
    "apg_scale",
    "duration_padding_sec",
    "sampler_kwargs",
    "response_format",
    "deadline_s",
]


@hypothesis_settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(fields=st.dictionaries(st.sampled_from(CONTROLS), json_values, max_size=4), prompt=st.text(max_size=20))
async def test_any_json_object_is_answered(client: httpx.AsyncClient, fields: dict[str, object], prompt: str) -> None:
    body = json.dumps({"prompt": prompt, "duration": 0.01} | fields)
    reply = await client.post(URL, content=body, headers=JSON)
    assert reply.status_code in {200, 422}, reply.text
    if reply.status_code == 422:
        reply.json()


@hypothesis_settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, len(WAV) - 1), replacement=st.binary(min_size=1, max_size=8), cut=st.booleans())
async def test_any_damaged_wav_is_answered(
    client: httpx.AsyncClient, position: int, replacement: bytes, cut: bool
) -> None:
    position = position % 60 if len(replacement) % 2 else position  # headers are where it hurts
    damaged = WAV[:position] + replacement + (b"" if cut else WAV[position + len(replacement) :])
    form = {"prompt": "x", "duration": "0.01"}
    reply = await client.post(VARIATIONS, data=form, files={"audio": damaged})
    assert reply.status_code in {200, 400}, reply.text
