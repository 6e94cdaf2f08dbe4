"""Peak limiting and loudness of clips in all dialects, and the manifest of a response with several clips."""

from __future__ import annotations

import io
import json
import zipfile
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import pytest
import soundfile

from stable_audio_serve.jobs.runner.runner import JobRunner
from tests.api.compat.serving import make_client
from tests.api.compat.test_aiml import poll_until
from tests.api.compat.test_aiml import submit as submit_aiml
from tests.api.test_jobs import submit, wait
from tests.audio_files import pcm_of
from tests.backends import ToneBackend

pytestmark = pytest.mark.server

URL = "/v1/audio/generations"
BODY = {"prompt": "x", "duration": 1, "seed": 300}
CEILING = 0.977
LAST_BIT = 2**-15


def read(data: bytes) -> npt.NDArray[np.float64]:
    samples, rate_hz = soundfile.read(io.BytesIO(data), always_2d=True)
    assert rate_hz == 44100
    return np.asarray(samples)


def peak(data: bytes) -> float:
    return float(np.abs(read(data)).max())


def facts(reply: httpx.Response) -> dict[str, Any]:
    return {name: json.loads(f"[{reply.headers[f'x-audio-{name}']}]") for name in ("peak", "loudness", "silent")}


def clipped(data: bytes) -> int:
    return int((np.abs(read(data)) >= 1 - LAST_BIT).sum())


async def test_loud_clip_is_limited_and_reported(client: httpx.AsyncClient, backend: ToneBackend) -> None:
    backend.level = 1.5
    reply = await client.post(URL, json=BODY)
    assert reply.status_code == 200, reply.text
    assert CEILING - 0.001 < peak(reply.content) <= CEILING + LAST_BIT
    assert facts(reply)["peak"] == [CEILING]
    assert facts(reply)["silent"] == [False]
    samples = read(reply.content)[:, 0]
    assert np.abs(np.fft.rfft(samples))[[900, 1500]].max() < 1e-3 * np.abs(np.fft.rfft(samples)).max()


async def test_requests_can_choose_the_peak_treatment(client: httpx.AsyncClient, backend: ToneBackend) -> None:
    backend.level = 1.5
    cut = await client.post(URL, json=BODY | {"peaks": "clip"})
    assert clipped(cut.content) > 10_000
    assert facts(cut)["peak"] == [1.0]
    limited = await client.post(URL, json=BODY | {"peaks": "limit"})
    assert limited.content == (await client.post(URL, json=BODY | {"peaks": None})).content
    backend.level = 0.2
    quiet = [pcm_of((await client.post(URL, json=BODY | {"peaks": peaks})).content) for peaks in ("limit", "clip")]
    assert quiet[0] == quiet[1]
    scaled = await client.post(URL, json=BODY | {"peaks": "scale"})
    assert peak(scaled.content) == pytest.approx(1.0, abs=LAST_BIT)


async def test_unknown_peak_treatment_is_refused(client: httpx.AsyncClient) -> None:
    reply = await client.post(URL, json=BODY | {"peaks": "louder"})
    assert reply.status_code == 422
    assert reply.json()["detail"][0]["loc"] == ["body", "peaks"]


async def test_setting_applies_to_requests_without_peaks() -> None:
    async with make_client(ToneBackend(level=1.5), audio={"peaks": "clip"}) as (client, _):
        assert clipped((await client.post(URL, json=BODY)).content) > 10_000
        assert clipped((await client.post(URL, json=BODY | {"peaks": "limit"})).content) == 0
        job = await wait(client, await submit(client))
        assert job["clips"][0]["peak"] == 1.0


async def test_loudness_is_reported_where_defined(client: httpx.AsyncClient, backend: ToneBackend) -> None:
    # By definition, a 997 Hz sine at full scale on one channel has -3.01 LUFS. This clip: two channels, at half scale.
    reply = await client.post(URL, json=BODY | {"seed": 897})
    assert facts(reply)["loudness"][0] == pytest.approx(-3.01 - 6.02 + 3.01, abs=0.1)
    short = await client.post(URL, json=BODY | {"duration": 0.39})
    assert facts(short)["loudness"] == [None]
    backend.level = 0.0003
    silent = await client.post(URL, json=BODY)
    assert (facts(silent)["silent"], facts(silent)["loudness"]) == ([True], [None])
    backend.level = 0.0
    assert (await client.post(URL, json=BODY)).headers["x-audio-peak"] == "0.0"


async def test_each_variation_is_described(client: httpx.AsyncClient, backend: ToneBackend) -> None:
    backend.level = 0.8
    reply = await client.post(URL, json=BODY | {"batch_size": 2})
    assert {name: len(values) for name, values in facts(reply).items()} == {"peak": 2, "loudness": 2, "silent": 2}
    assert reply.headers["x-seeds"] == "300, 301"


async def test_job_and_synchronous_response_have_the_same_facts(
    client: httpx.AsyncClient, backend: ToneBackend, runner: JobRunner
) -> None:
    backend.level = 1.2
    at_once = await client.post(URL, json=BODY | {"batch_size": 2})
    job = await wait(client, await submit(client, **BODY | {"batch_size": 2}))
    assert [clip["seed"] for clip in job["clips"]] == [300, 301]
    for name in ("peak", "loudness", "silent"):
        assert [clip[name] for clip in job["clips"]] == facts(at_once)[name]
    for reply in (await client.get(job["download_url"]), await client.head(job["download_url"])):
        for name in ("x-seed", "x-seeds", "x-audio-peak", "x-audio-loudness", "x-audio-silent"):
            assert reply.headers[name] == at_once.headers[name]


@pytest.mark.parametrize(("peaks", "expected"), [(None, CEILING), ("clip", 1.0)])
async def test_other_dialects_limit_and_describe_clips_too(
    client: httpx.AsyncClient, backend: ToneBackend, runner: JobRunner, peaks: str | None, expected: float
) -> None:
    backend.level = 1.5
    extra = {"peaks": peaks} if peaks else {}
    vllm = await client.post("/v1/audio/generate", json={"input": "x", "audio_length": 1, "seed": 300} | extra)
    assert vllm.headers["x-seed"] == "300"
    fal = await client.post("/fal-ai/stable-audio", json={"prompt": "x", "seconds_total": 1} | extra)
    aiml = await poll_until(client, await submit_aiml(client, seconds_total=1, **extra), "completed")
    links = [body["audio_file"]["url"] for body in (fal.json(), aiml)]
    for reply in (vllm, *[await client.get(link) for link in links]):
        assert peak(reply.content) == pytest.approx(expected, abs=2 * LAST_BIT)
        assert facts(reply)["peak"] == [expected]
        assert int(reply.headers["x-seed"]) >= 0


async def test_open_small_normalizes_to_full_scale(client: httpx.AsyncClient, backend: ToneBackend) -> None:
    """Each clip is divided by its peak. `peaks`, a field of another dialect, has no effect."""
    for level in (0.2, 1.5):
        backend.level = level
        body = {"prompt": "x", "seconds_total": 1, "seed": 305, "peaks": "limit"}
        reply = await client.post("/saos/generate", json=body)
        assert facts(reply)["peak"] == [1.0]
        assert clipped(reply.content) < 2000  # few of the 88,200 samples: only the crests of the sine
        assert peak(reply.content) == pytest.approx(1.0, abs=2 * LAST_BIT)


@pytest.mark.parametrize("seed", [-2, 2**63 - 1, 2**64 - 1])
async def test_every_reported_seed_repeats_its_variation(client: httpx.AsyncClient, seed: int) -> None:
    body = BODY | {"response_format": "wav"}
    batch = await client.post(URL, json=body | {"seed": seed, "batch_size": 3})
    seeds = [int(reported) for reported in batch.headers["x-seeds"].split(",")]
    assert all(0 <= reported < 2**63 for reported in seeds)
    made = zipfile.ZipFile(io.BytesIO(batch.content))
    for name, reported in zip(made.namelist(), seeds, strict=True):
        alone = await client.post(URL, json=body | {"seed": reported})
        assert alone.headers["x-seed"] == str(reported)
        assert alone.content == made.read(name)


async def test_manifest_is_added_on_request(client: httpx.AsyncClient, runner: JobRunner) -> None:
    body = BODY | {"prompt": " löwe ", "batch_size": 2, "model": "medium"}
    plain = zipfile.ZipFile(io.BytesIO((await client.post(URL, json=body)).content))
    reply = await client.post(URL, json=body | {"manifest": True})
    job = await wait(client, await submit(client, **body, manifest=True))
    for data in (reply.content, (await client.get(job["download_url"])).content):
        archive = zipfile.ZipFile(io.BytesIO(data))
        assert archive.namelist() == [*plain.namelist(), "manifest.json"]
        manifest = json.loads(archive.read("manifest.json"))
        assert (manifest["model"], manifest["prompt"], manifest["duration"]) == ("medium", "löwe", 1)
        assert [file.pop("name") for file in manifest["files"]] == plain.namelist()
        assert [file.pop("recipe") for file in manifest["files"]] == job["recipes"]
        assert manifest["files"] == job["clips"]
        assert [archive.read(name) for name in plain.namelist()] == [plain.read(name) for name in plain.namelist()]


async def test_single_variation_has_no_manifest(client: httpx.AsyncClient) -> None:
    plain = await client.post(URL, json=BODY)
    assert (await client.post(URL, json=BODY | {"manifest": True})).content == plain.content
