from __future__ import annotations

import gc
import io
import weakref
from typing import Any

import httpx
import numpy as np
import pytest
import soundfile

from stable_audio_serve.api.service import Service
from stable_audio_serve.core.generation import SourceAudio
from stable_audio_serve.jobs.store.client_jobs import Added
from tests.audio_files import make_audio_file
from tests.backends import ToneBackend

VARIATIONS = "/v1/audio/variations"
INPAINT = "/v1/audio/inpaint"


async def test_variation_uses_its_source(client: httpx.AsyncClient, backend: ToneBackend) -> None:
    wav = make_audio_file(duration_s=2.0, rate_hz=48000, channels=1)
    form = {"prompt": " x ", "duration": "1.5", "negative_prompt": "", "seed": "3", "unknown": "1"}
    reply = await client.post(VARIATIONS, data=form, files={"audio": ("a.wav", wav, "audio/wav")})
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"] == "audio/wav"
    assert soundfile.info(io.BytesIO(reply.content)).frames == 66150
    request = backend.last
    assert (request.prompt, request.negative_prompt, request.seed, request.init_noise_level) == ("x", None, 3, 0.9)
    assert request.init_audio is not None
    assert request.inpaint_audio is None
    assert request.init_audio.sample_rate_hz == 48000
    expected = soundfile.read(io.BytesIO(wav), dtype="float32", always_2d=True)[0].T
    np.testing.assert_array_equal(request.init_audio.samples, expected)


@pytest.mark.parametrize("text", ["", "  ", "\t\n"])
async def test_blank_negative_prompt_of_a_form_is_none(
    client: httpx.AsyncClient, backend: ToneBackend, text: str
) -> None:
    audio = {"audio": ("a.wav", make_audio_file(duration_s=0.5), "audio/wav")}
    reply = await client.post(VARIATIONS, data={"prompt": "x", "negative_prompt": text}, files=audio)
    assert reply.status_code == 200, reply.text
    assert backend.last.negative_prompt is None


@pytest.mark.parametrize("name", ["UTF-8''%C3%A9.wav", "utf-8'en'a.wav", "\"UTF-8''a.wav\""])
async def test_upload_with_only_an_extended_file_name(client: httpx.AsyncClient, name: str) -> None:
    parts = [
        b'--B\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nx\r\n',
        f'--B\r\nContent-Disposition: form-data; name="audio"; filename*={name}\r\n\r\n'.encode(),
        make_audio_file(duration_s=0.5),
        b"\r\n--B--\r\n",
    ]
    headers = {"content-type": "multipart/form-data; boundary=B"}
    reply = await client.post(VARIATIONS, content=b"".join(parts), headers=headers)
    assert reply.status_code == 200, reply.text


@pytest.mark.parametrize(
    ("start", "end", "regions"),
    [
        ("4", "6.5", ((4.0, 6.5),)),
        ("[2,12]", "[4, 15]", ((2.0, 4.0), (12.0, 15.0))),
        ("2,12", "4 , 15,", ((2.0, 4.0), (12.0, 15.0))),
        ("[2]", "4,", ((2.0, 4.0),)),
        ("0", "20", ((0.0, 20.0),)),
        (" 1e0 ", "2", ((1.0, 2.0),)),
        ('["1"]', "[2]", ((1.0, 2.0),)),
    ],
)
@pytest.mark.usefixtures("low_rate")
async def test_regions_in_every_spelling(
    client: httpx.AsyncClient, backend: ToneBackend, start: str, end: str, regions: tuple[tuple[float, float], ...]
) -> None:
    for infix in ("", "mask_"):
        times = {f"inpaint_{infix}start_seconds": start, f"inpaint_{infix}end_seconds": end}
        upload = {"audio": make_audio_file(duration_s=0.2)}
        reply = await client.post(INPAINT, data={"prompt": "x", "duration": "20"} | times, files=upload)
        assert reply.status_code == 200, reply.text
        assert backend.last.inpaint_regions_s == regions
        assert backend.last.inpaint_audio is not None
        assert backend.last.init_audio is None


async def test_extension_is_a_region_past_the_end_of_the_source(
    client: httpx.AsyncClient, backend: ToneBackend
) -> None:
    form = {"prompt": "x", "duration": "4", "inpaint_start_seconds": "1", "inpaint_end_seconds": "4"}
    reply = await client.post(INPAINT, data=form, files={"audio": make_audio_file(duration_s=1.0)})
    assert reply.status_code == 200
    assert soundfile.info(io.BytesIO(reply.content)).frames == 4 * 44100


async def test_all_controls_work_as_form_fields(client: httpx.AsyncClient, backend: ToneBackend) -> None:
    form = {
        "prompt": "x",
        "model": "stable-audio-3-medium",
        "negative_prompt": "hiss",
        "duration": "0.5",
        "steps": "12",
        "cfg_scale": "3.5",
        "batch_size": "2",
        "seed": "9",
        "chunked_decode": "false",
        "apg_scale": "0.5",
        "duration_padding_sec": "2",
        "init_noise_level": "0.25",
        "sampler_kwargs": '{"sampler_type": "pingpong", "scale_phi": 0.75}',
        "response_format": "flac",
    }
    reply = await client.post(VARIATIONS, data=form, files={"audio": make_audio_file(duration_s=0.2)})
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-disposition"].endswith('"stable-audio-3-medium-batch.zip"')
    request = backend.last
    assert (request.steps, request.cfg_scale, request.batch_size, request.seed) == (12, 3.5, 2, 9)
    assert (request.chunked_decode, request.apg_scale, request.duration_padding_s) == (False, 0.5, 2.0)
    assert (request.sampler, request.cfg_rescale, request.init_noise_level) == ("pingpong", 0.75, 0.25)


async def test_source_is_cut_to_the_part_the_model_can_use(client: httpx.AsyncClient, backend: ToneBackend) -> None:
    form = {"prompt": "x", "model": "demo", "duration": "1", "duration_padding_sec": "2"}
    upload = make_audio_file(duration_s=60.0, rate_hz=8000)
    assert (await client.post(VARIATIONS, data=form, files={"audio": upload})).status_code == 200
    assert backend.last.init_audio is not None
    assert 7 * 8000 <= backend.last.init_audio.samples.shape[1] <= 9 * 8000


@pytest.mark.parametrize("url", ["/jobs/variations", "/jobs/inpaint"])
async def test_decoded_audio_is_freed_before_a_job_is_added(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    samples: list[weakref.ref[object]] = []
    is_freed: list[bool] = []
    decode, add_job = Service.decode, Service.add_job

    async def decode_and_watch(self: Service, *args: Any, **options: Any) -> SourceAudio:
        source = await decode(self, *args, **options)
        samples.append(weakref.ref(source.samples))
        return source

    async def look_and_add_job(self: Service, *args: Any, **options: Any) -> Added:
        gc.collect()
        is_freed.extend(ref() is None for ref in samples)
        return await add_job(self, *args, **options)

    monkeypatch.setattr(Service, "decode", decode_and_watch)
    monkeypatch.setattr(Service, "add_job", look_and_add_job)
    form = {"prompt": "x", "duration": "1", "init_noise_level": "0.5"}
    region = {"inpaint_start_seconds": "0.2", "inpaint_end_seconds": "0.5"} if "inpaint" in url else {}
    reply = await client.post(url, data=form | region, files={"audio": ("a.wav", make_audio_file(), "audio/wav")})
    assert reply.status_code == 202, reply.text
    assert is_freed == [True]
