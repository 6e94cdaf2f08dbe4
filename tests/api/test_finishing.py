"""Loudness and fades of native requests: fields, answers, jobs, recipes and replays."""

from __future__ import annotations

import io
import json
from typing import Any

import httpx
import numpy as np
import pytest
import soundfile

from stable_audio_serve.jobs.runner.runner import JobRunner
from tests.api.test_jobs import submit, wait
from tests.audio_files import make_audio_file
from tests.backends import ToneBackend

URL = "/v1/audio/generations"
ROUTES = (URL, "/v1/audio/variations", "/v1/audio/inpaint", "/jobs", "/jobs/variations", "/jobs/inpaint")
SOURCE = {"audio": ("a.wav", make_audio_file(duration_s=1.0))}
BASE = {"prompt": "a tone", "duration": 1, "seed": 3}


async def post(client: httpx.AsyncClient, url: str, fields: dict[str, Any]) -> httpx.Response:
    """Post `fields` as JSON, or as a form with source audio, in which objects are JSON text."""
    if url in {URL, "/jobs"}:
        return await client.post(url, json=fields)
    if url.endswith("inpaint"):
        fields = {"inpaint_start_seconds": 0.2, "inpaint_end_seconds": 0.4, **fields}
    form = {name: value if isinstance(value, str) else json.dumps(value) for name, value in fields.items()}
    return await client.post(url, data=form, files=SOURCE)


@pytest.mark.parametrize("url", ROUTES[:3])
async def test_loudness_and_fades_are_applied(client: httpx.AsyncClient, url: str) -> None:
    fields = {**BASE, "loudness": {"target_lufs": -20, "true_peak_dbtp": -2}, "fade_in_s": 0.1, "fade_out_s": 0.05}
    reply = await post(client, url, fields)
    assert reply.status_code == 200, reply.text
    assert float(reply.headers["x-audio-loudness"]) == pytest.approx(-20, abs=1)
    assert float(reply.headers["x-audio-true-peak"]) == pytest.approx(-18, abs=1)
    audio, _ = soundfile.read(io.BytesIO(reply.content))
    assert np.abs(audio[:200]).max() < 0.05 * np.abs(audio).max()
    recipe = json.loads(reply.headers["x-recipe"])
    assert recipe["loudness"] == {"target_lufs": -20, "true_peak_dbtp": -2}
    assert (recipe["fade_in_s"], recipe["fade_out_s"]) == (0.1, 0.05)
    replay = await client.post("/v1/audio/replay", data={"recipe": json.dumps(recipe)}, files=SOURCE)
    assert replay.content == reply.content


async def test_jobs_finish_clips_too(client: httpx.AsyncClient, runner: JobRunner) -> None:
    fields = {**BASE, "loudness": {"target_lufs": -20}, "fade_in_s": 0.1}
    job = await wait(client, await submit(client, **fields))
    (clip,), (recipe,) = job["clips"], job["recipes"]
    assert clip["loudness"] == pytest.approx(-20, abs=0.6)
    assert clip["true_peak"] < -15
    assert recipe["loudness"] == {"target_lufs": -20, "true_peak_dbtp": -1}
    synchronous = await client.post(URL, json=fields)
    assert (await client.get(job["download_url"])).content == synchronous.content


@pytest.mark.usefixtures("low_rate")
@pytest.mark.parametrize("response_format", ["wav", "flac", "mp3", "ogg", "opus"])
async def test_variations_are_finished_in_every_format(client: httpx.AsyncClient, response_format: str) -> None:
    fields = {**BASE, "batch_size": 2, "loudness": {"target_lufs": -20}, "response_format": response_format}
    reply = await post(client, URL, fields)
    assert [float(text) for text in reply.headers["x-audio-loudness"].split(",")] == [-20, -20]
    assert len(reply.headers["x-audio-true-peak"].split(",")) == 2


async def test_clips_without_loudness_have_no_true_peak(client: httpx.AsyncClient) -> None:
    for fields in (BASE, {**BASE, "loudness": None, "fade_in_s": None, "fade_out_s": 0}):
        reply = await post(client, URL, fields)
        assert reply.status_code == 200, reply.text
        assert "x-audio-true-peak" not in reply.headers
        assert not {"loudness", "fade_in_s", "fade_out_s"} & json.loads(reply.headers["x-recipe"]).keys()
    for text in ("", "null", " "):
        reply = await post(client, ROUTES[1], {**BASE, "loudness": text})
        assert reply.status_code == 200, reply.text


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"loudness": {}}, "target_lufs"),
        ({"loudness": {"target_lufs": None}}, "target_lufs"),
        ({"loudness": {"target_lufs": -4.9}}, "target_lufs"),
        ({"loudness": {"target_lufs": -70.1}}, "target_lufs"),
        ({"loudness": {"target_lufs": "loud"}}, "target_lufs"),
        ({"loudness": {"target_lufs": -14, "true_peak_dbtp": 0.1}}, "true_peak_dbtp"),
        ({"loudness": {"target_lufs": -14, "true_peak_dbtp": -9.1}}, "true_peak_dbtp"),
        ({"loudness": {"target_lufs": -14, "true_peak": -1}}, "true_peak"),
        ({"loudness": -14}, "loudness"),
        ({"loudness": [-14]}, "loudness"),
        ({"loudness": {"target_lufs": -14}, "duration": 0.39}, "loudness"),
        ({"fade_in_s": -0.1}, "fade_in_s"),
        ({"fade_out_s": "long"}, "fade_out_s"),
        ({"fade_in_s": 1.1}, "fade_in_s"),
        ({"fade_in_s": 0.6, "fade_out_s": 0.6}, "fade_out_s"),
        ({"fade_out_s": 1e300}, "fade_out_s"),
    ],
)
async def test_bad_finishing_is_refused_by_name(
    client: httpx.AsyncClient, backend: ToneBackend, fields: dict[str, Any], field: str
) -> None:
    for url in ROUTES:
        reply = await post(client, url, {**BASE, **fields, "inpaint_start_seconds": 0, "inpaint_end_seconds": 0.2})
        assert reply.status_code == 422, reply.text
        assert field in [fault["loc"][-1] for fault in reply.json()["detail"]]
    assert not backend.requests


@pytest.mark.parametrize(("fade_in_s", "fade_out_s", "duration"), [(0.1, 0.2, 0.3), (0.54, 1.26, 1.8), (0, 1, 1)])
async def test_fades_may_be_as_long_as_the_clip(
    client: httpx.AsyncClient, fade_in_s: float, fade_out_s: float, duration: float
) -> None:
    fades = {"fade_in_s": fade_in_s, "fade_out_s": fade_out_s, "duration": duration}
    assert (await post(client, URL, {**BASE, **fades})).status_code == 200


@pytest.mark.parametrize("name", ["fade_in_s", "fade_out_s"])
async def test_fades_of_a_loop_are_refused(client: httpx.AsyncClient, name: str) -> None:
    reply = await post(client, URL, {**BASE, "loop": True, name: 0.1})
    assert reply.status_code == 422
    assert reply.json()["detail"][0]["loc"][-1] == name


@pytest.mark.parametrize("text", ["{", "[]", "nan", '{"target_lufs": NaN}', '{"target_lufs": 1e999}', "-14"])
async def test_bad_loudness_text_is_refused(client: httpx.AsyncClient, text: str) -> None:
    reply = await post(client, ROUTES[1], {**BASE, "loudness": text})
    assert reply.status_code == 422, reply.text
    assert "loudness" in reply.json()["detail"][0]["loc"]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"loudness": {"target_lufs": 0.0, "true_peak_dbtp": -1.0}}, "target_lufs"),
        ({"fade_in_s": 2.0}, "fade_in_s"),
        ({"duration": 0.1, "loudness": {"target_lufs": -20.0, "true_peak_dbtp": -1.0}}, "loudness"),
        ({"loop": "free", "fade_out_s": 0.1}, "fade_out_s"),
    ],
)
async def test_recipes_with_bad_finishing_are_refused(
    client: httpx.AsyncClient, changes: dict[str, Any], field: str
) -> None:
    recipe = json.loads((await post(client, URL, BASE)).headers["x-recipe"])
    reply = await client.post("/v1/audio/replay", json={**recipe, **changes})
    assert reply.status_code == 422, reply.text
    assert field in reply.json()["detail"][0]["loc"]
