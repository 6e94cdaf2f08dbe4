"""The fields that choose a file's format, on the native routes and in jobs."""

from __future__ import annotations

import io
import json
import zipfile
from importlib.util import find_spec
from typing import Any

import httpx
import pytest
import soundfile

from stable_audio_serve.audio import formats
from stable_audio_serve.jobs.runner.runner import JobRunner
from tests.api.test_jobs import submit, wait
from tests.audio_files import make_audio_file
from tests.parameters import few

URL = "/v1/audio/generations"
BODY = {"prompt": "x", "duration": 1, "seed": 7}
RAW = {"pcm": "PCM_16", "ulaw": "ULAW", "alaw": "ALAW"}

# Fields of a request -> media type, file name suffix, sample rate, subtype.
ACCEPTED = [
    ({}, ("audio/wav", "wav", 44_100, "PCM_16")),
    ({"bit_depth": 24}, ("audio/wav", "wav", 44_100, "PCM_24")),
    ({"bit_depth": "float", "sample_rate": 48_000}, ("audio/wav", "wav", 48_000, "FLOAT")),
    ({"response_format": "flac", "bit_depth": 24}, ("audio/flac", "flac", 44_100, "PCM_24")),
    ({"response_format": "mp3", "bitrate": 128}, ("audio/mpeg", "mp3", 44_100, "MPEG_LAYER_III")),
    ({"response_format": "mp3", "bitrate": 8}, ("audio/mpeg", "mp3", 8000, "MPEG_LAYER_III")),
    ({"response_format": "ogg", "bitrate": 320}, ("audio/ogg", "ogg", 44_100, "VORBIS")),
    ({"response_format": "opus", "bitrate": 96}, ("audio/ogg", "opus", 48_000, "OPUS")),
    ({"response_format": "pcm"}, ("audio/pcm", "pcm", 44_100, "PCM_16")),
    ({"response_format": "pcm", "bit_depth": 16, "sample_rate": 16_000}, ("audio/pcm", "pcm", 16_000, "PCM_16")),
    ({"response_format": "ulaw"}, ("audio/basic", "ulaw", 8000, "ULAW")),
    ({"response_format": "alaw", "sample_rate": 8000}, ("audio/x-alaw-basic", "alaw", 8000, "ALAW")),
]

# Fields of a request -> the field that is refused, and a part of the message.
REFUSED = [
    ({"response_format": "m4a"}, "response_format", "pip install 'stable-audio-serve[aac]'"),
    ({"response_format": "aac"}, "response_format", "pip install 'stable-audio-serve[aac]'"),
    *(
        ({"response_format": name}, "response_format", "one of wav, flac, mp3, ogg, opus, pcm, ulaw, alaw")
        for name in ("mp4", "", 5, None)
    ),
    ({"response_format": "mp3", "bitrate": 7}, "bitrate", "8"),
    ({"response_format": "mp3", "bitrate": 321}, "bitrate", "320"),
    ({"response_format": "mp3", "bitrate": "k"}, "bitrate", "integer"),
    ({"response_format": "mp3", "bitrate": "321k"}, "bitrate", "320"),
    ({"response_format": "mp3", "bitrate": 320, "sample_rate": 22_050}, "bitrate", "from 8 to 160"),
    ({"response_format": "wav", "bitrate": 128}, "bitrate", "only mp3, ogg or opus"),
    ({"response_format": "mp3", "bit_depth": 24}, "bit_depth", "unset for mp3"),
    ({"response_format": "flac", "bit_depth": "float"}, "bit_depth", "16 or 24"),
    ({"bit_depth": 32}, "bit_depth", "16, 24 or 'float'"),
    ({"sample_rate": 44_099}, "sample_rate", "8000, 16000, 22050, 24000, 32000, 44100 or 48000"),
    ({"response_format": "opus", "sample_rate": 44_100}, "sample_rate", "8000, 16000, 24000 or 48000"),
    ({"response_format": "alaw", "sample_rate": 16_000}, "sample_rate", "8000"),
]


@pytest.fixture(autouse=True)
def _without_aac(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide PyAV, which a computer may have."""
    kept = tuple(name for name in formats.available_formats() if name not in ("m4a", "aac"))
    monkeypatch.setattr(formats, "available_formats", lambda: kept)


def describe(content: bytes, name: str) -> tuple[int, int, str]:
    """Return the number of samples, the number of channels and the subtype of a file."""
    if name in RAW:
        width = 4 if name == "pcm" else 1
        return len(content) // width, 2 if name == "pcm" else 1, RAW[name]
    info = soundfile.info(io.BytesIO(content))
    return info.frames, info.channels, info.subtype


@pytest.mark.parametrize(("fields", "expected"), ACCEPTED)
async def test_formats_are_returned(
    client: httpx.AsyncClient, fields: dict[str, Any], expected: tuple[str, str, int, str]
) -> None:
    media_type, name, rate_hz, subtype = expected
    reply = await client.post(URL, json=BODY | fields)
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"] == media_type
    assert reply.headers["content-disposition"].endswith(f'.{name}"')
    assert reply.headers["x-sample-rate"] == str(rate_hz)
    samples, channels, found = describe(reply.content, name)
    assert (channels, found) == (1 if name in ("ulaw", "alaw") else 2, subtype)
    assert samples == pytest.approx(rate_hz, abs=1)
    recipe = json.loads(reply.headers["x-recipe"])
    assert {field: recipe[field] for field in fields} == fields


async def test_bit_rates_may_have_their_unit(client: httpx.AsyncClient) -> None:
    reply = await client.post(URL, json=BODY | {"response_format": "mp3", "bitrate": "192k"})
    assert json.loads(reply.headers["x-recipe"])["bitrate"] == 192


@pytest.mark.parametrize(("fields", "field", "message"), REFUSED)
async def test_values_without_meaning_are_refused(
    client: httpx.AsyncClient, fields: dict[str, Any], field: str, message: str
) -> None:
    for url in (URL, "/jobs", "/sa3/generate"):
        reply = await client.post(url, json=BODY | fields)
        assert reply.status_code == 422, reply.text
        (fault,) = reply.json()["detail"]
        assert fault["loc"] == ["body", field]
        assert message in fault["msg"]


async def test_form_fields_choose_the_format(client: httpx.AsyncClient) -> None:
    form = {"prompt": "x", "duration": "1", "bit_depth": "24", "sample_rate": "48000"}
    files = {"audio": make_audio_file(duration_s=1.0)}
    region = {"inpaint_start_seconds": "0.2", "inpaint_end_seconds": "0.5"}
    for url, more in (("/v1/audio/variations", {}), ("/v1/audio/inpaint", region)):
        reply = await client.post(url, data=form | more, files=files)
        assert reply.status_code == 200, reply.text
        assert soundfile.info(io.BytesIO(reply.content)).subtype == "PCM_24"
        assert reply.headers["x-sample-rate"] == "48000"
        refused = await client.post(url, data=form | more | {"response_format": "mp3"}, files=files)
        assert (refused.status_code, refused.json()["detail"][0]["loc"]) == (422, ["body", "bit_depth"])


@pytest.mark.server
@pytest.mark.parametrize(("fields", "expected"), few([ACCEPTED[4], ACCEPTED[9], *ACCEPTED[1:4], ACCEPTED[7]]))
async def test_jobs_have_the_same_file(
    client: httpx.AsyncClient, runner: JobRunner, fields: dict[str, Any], expected: tuple[str, str, int, str]
) -> None:
    at_once = await client.post(URL, json=BODY | fields)
    job = await wait(client, await submit(client, **BODY | fields))
    assert job["sample_rate"] == expected[2]
    assert job["download_content_type"] == expected[0]
    assert (await client.get(job["download_url"])).content == at_once.content
    assert job["recipes"] == [json.loads(at_once.headers["x-recipe"])]


async def test_variations_in_an_archive_have_the_format(client: httpx.AsyncClient) -> None:
    fields = {"response_format": "mp3", "bitrate": 64, "sample_rate": 24_000, "batch_size": 2, "manifest": True}
    reply = await client.post(URL, json=BODY | fields)
    archive = zipfile.ZipFile(io.BytesIO(reply.content))
    *names, manifest = archive.namelist()
    assert json.loads(archive.read(manifest))["sample_rate"] == 24_000
    for name in names:
        assert name.endswith(".mp3")
        data = archive.read(name)
        assert soundfile.info(io.BytesIO(data)).samplerate == 24_000
        assert len(data) * 8 / 1000 == pytest.approx(64, rel=0.15)


async def test_schema_lacks_formats_that_are_not_installed(client: httpx.AsyncClient) -> None:
    if find_spec("av"):
        pytest.skip("PyAV is installed")
    document = (await client.get("/openapi.json")).json()
    schemas = document["components"]["schemas"]
    for name in ("GenerationBody", "VariationForm", "JobBody", "Recipe"):
        listed = schemas[name]["properties"]["response_format"]["enum"]
        assert listed == ["wav", "flac", "mp3", "ogg", "opus", "pcm", "ulaw", "alaw"]
    assert "m4a" not in json.dumps(document)
