from __future__ import annotations

import asyncio
import io
import re
import zipfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import soundfile

from stable_audio_serve.core.errors import GenerationError, InvalidRequestError
from stable_audio_serve.core.settings import Settings
from stable_audio_serve.jobs.queue import JobQueue
from stable_audio_serve.jobs.runner.runner import JobRunner
from tests.api.compat.serving import make_client
from tests.audio_files import make_audio_file
from tests.backends import ToneBackend
from tests.patience import PATIENCE_S, until

BODY = {"prompt": "rain on a roof", "duration": 1.5, "seed": 11}
REGION = {"inpaint_start_seconds": "0.5", "inpaint_end_seconds": "1"}
KEYS = {
    "id",
    "status",
    "mode",
    "model",
    "duration",
    "steps",
    "output_count",
    "created_at",
    "started_at",
    "completed_at",
    "download_url",
    "download_content_type",
    "error",
    "storage_backend",
    "storage_key",
    "sample_rate",
    "progress",
    "attempts",
    "priority",
    "seeds",
    "clips",
    "device",
    "dtype",
    "recipes",
    "warnings",
}

ENDS = ("succeeded", "failed", "cancelled")


async def submit(client: httpx.AsyncClient, path: str = "/jobs", **fields: Any) -> dict[str, Any]:
    """Submit a job with `BODY` and `fields`, and with an upload if the path needs one. Returns the response's JSON."""
    if path.endswith("/jobs"):
        reply = await client.post(path, json=BODY | fields)
    else:
        region = REGION if path.endswith("inpaint") else {}
        form = {name: str(value) for name, value in (BODY | region | fields).items()}
        reply = await client.post(path, data=form, files={"audio": ("a.wav", make_audio_file(duration_s=1.0))})
    assert reply.status_code == 202, reply.text
    ticket: dict[str, Any] = reply.json()
    return ticket


async def show(client: httpx.AsyncClient, ticket: dict[str, Any]) -> dict[str, Any]:
    reply = await client.get(ticket["status_url"])
    assert reply.status_code == 200, reply.text
    status: dict[str, Any] = reply.json()
    assert set(status) - {"replay"} == KEYS  # only replays of long pieces have this key
    return status


async def wait(client: httpx.AsyncClient, ticket: dict[str, Any], *words: str) -> dict[str, Any]:
    """Wait until the job's status is one of `words`, by default until the job ends. Returns the job."""
    async with asyncio.timeout(PATIENCE_S):
        while (status := await show(client, ticket))["status"] not in (words or ENDS):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    return status


@pytest.mark.parametrize("prefix", ["", "/sa3"])
async def test_ticket_has_an_id_and_an_absolute_url(client: httpx.AsyncClient, prefix: str) -> None:
    ticket = await submit(client, f"{prefix}/jobs")
    assert set(ticket) == {"id", "status", "status_url"}
    assert re.fullmatch(r"[0-9a-f]{32}", ticket["id"])
    assert ticket["status"] == "queued"
    assert ticket["status_url"] == f"http://localhost{prefix}/jobs/{ticket['id']}"


async def test_urls_use_the_host_of_the_request(client: httpx.AsyncClient, runner: JobRunner) -> None:
    headers, base = {"X-Forwarded-Proto": "https", "X-Forwarded-Host": "a.example"}, "https://a.example"
    ticket = (await client.post("/jobs", json=BODY, headers=headers)).json()
    assert ticket["status_url"] == f"{base}/jobs/{ticket['id']}"
    path = f"/jobs/{ticket['id']}"
    await wait(client, {"status_url": path})
    status = (await client.get(path, headers=headers)).json()
    assert status["download_url"] == f"{base}{path}/audio"


async def test_public_url_overrides_the_host() -> None:
    async with make_client(api={"public_url": "https://audio.example.com/v1/"}, run_jobs=False) as (client, _):
        ticket = await submit(client)
    assert ticket["status_url"] == f"https://audio.example.com/v1/jobs/{ticket['id']}"


async def test_queued_job_has_every_field(client: httpx.AsyncClient) -> None:
    before = datetime.now(UTC)
    status = await show(client, ticket := await submit(client, batch_size=2, steps=5, model="stable-audio-3-medium"))
    created_at = datetime.fromisoformat(status.pop("created_at"))
    assert created_at.utcoffset() == timedelta(0)
    assert before - timedelta(milliseconds=1) <= created_at <= datetime.now(UTC)
    assert status == {
        "id": ticket["id"],
        "status": "queued",
        "mode": "text-to-audio",
        "model": "medium",
        "duration": 1.5,
        "steps": 5,
        "output_count": 2,
        "storage_backend": "local",
        **dict.fromkeys(("started_at", "completed_at", "download_url", "download_content_type"), None),
        **dict.fromkeys(("error", "storage_key", "sample_rate"), None),
        "attempts": 0,
        "priority": "interactive",
        "progress": status["progress"],
        "seeds": [11, 12],
        "clips": None,
        "device": None,
        "dtype": None,
        "recipes": None,
        "warnings": [],
    }


async def test_running_job_has_its_start_time(
    client: httpx.AsyncClient, backend: ToneBackend, runner: JobRunner
) -> None:
    backend.released.clear()
    ticket = await submit(client)
    status = await wait(client, ticket, "running")
    assert datetime.fromisoformat(status["started_at"]) >= datetime.fromisoformat(status["created_at"])
    assert (status["completed_at"], status["download_url"], status["error"]) == (None, None, None)
    assert (await client.get(f"/jobs/{ticket['id']}/audio")).status_code == 409
    backend.released.set()
    await wait(client, ticket, "succeeded")


async def test_job_result_matches_the_synchronous_response(
    client: httpx.AsyncClient, settings: Settings, runner: JobRunner
) -> None:
    ticket = await submit(client)
    status = await wait(client, ticket)
    assert status["status"] == "succeeded"
    assert datetime.fromisoformat(status["completed_at"]) >= datetime.fromisoformat(status["started_at"])
    assert status["download_url"] == f"http://localhost/jobs/{ticket['id']}/audio"
    assert (status["download_content_type"], status["sample_rate"], status["output_count"]) == ("audio/wav", 44100, 1)
    assert (status["storage_backend"], status["storage_key"], status["error"]) == ("local", ticket["id"], None)
    download = await client.get(status["download_url"])
    expected = await client.post("/v1/audio/generations", json=BODY)
    assert download.content == expected.content
    for name in ("content-type", "content-length"):
        assert download.headers[name] == expected.headers[name]
    name = f"{ticket['id']}-stable-audio-3-small-sfx.wav"
    assert download.headers["content-disposition"] == f'attachment; filename="{name}"'
    assert download.headers["x-content-type-options"] == "nosniff"
    assert (Path(settings.output_dir) / name).read_bytes() == download.content


async def test_several_variations_become_a_zip(
    client: httpx.AsyncClient, settings: Settings, runner: JobRunner
) -> None:
    ticket = await submit(client, batch_size=3, model="medium")
    status = await wait(client, ticket)
    assert (status["download_content_type"], status["output_count"]) == ("application/zip", 3)
    download = await client.get(status["download_url"])
    name = f"{ticket['id']}-stable-audio-3-medium-batch.zip"
    assert download.headers["content-disposition"] == f'attachment; filename="{name}"'
    names = zipfile.ZipFile(io.BytesIO(download.content)).namelist()
    assert names == [f"stable-audio-3-medium-0{number}.wav" for number in (1, 2, 3)]
    assert (Path(settings.output_dir) / name).is_file()


async def test_job_with_a_random_seed_reports_it_from_the_start(client: httpx.AsyncClient, runner: JobRunner) -> None:
    first, second = [await submit(client, seed=-1, batch_size=2) for _ in range(2)]
    seeds = (await show(client, first))["seeds"]
    assert seeds == [seeds[0], seeds[0] + 1]
    assert seeds != (await show(client, second))["seeds"]
    done = await wait(client, first)
    assert done["seeds"] == seeds
    audio = await client.get(done["download_url"])
    assert (audio.headers["x-seed"], audio.headers["x-seeds"]) == (str(seeds[0]), f"{seeds[0]}, {seeds[1]}")
    again = await wait(client, await submit(client, seed=seeds[0], batch_size=2))
    assert (await client.get(again["download_url"])).content == audio.content


async def test_extension_fields_apply_to_jobs(client: httpx.AsyncClient, runner: JobRunner) -> None:
    status = await wait(client, await submit(client, response_format="flac"))
    assert status["download_content_type"] == "audio/flac"
    download = await client.get(status["download_url"])
    assert soundfile.info(io.BytesIO(download.content)).format == "FLAC"


@pytest.mark.parametrize(
    ("job", "synchronous", "mode"),
    [
        ("/jobs", "/v1/audio/generations", "text-to-audio"),
        ("/jobs/variations", "/v1/audio/variations", "audio-to-audio"),
        ("/jobs/inpaint", "/v1/audio/inpaint", "inpainting"),
    ],
)
async def test_model_gets_the_same_request_as_from_the_synchronous_route(
    client: httpx.AsyncClient, backend: ToneBackend, runner: JobRunner, job: str, synchronous: str, mode: str
) -> None:
    fields: dict[str, Any] = {"negative_prompt": "hum", "steps": 6, "cfg_scale": 2.5, "apg_scale": 0.5}
    if job == "/jobs":
        await client.post(synchronous, json=BODY | fields | {"sampler_kwargs": {"sampler_type": "rk4"}})
        status = await wait(client, await submit(client, job, **fields, sampler_kwargs={"sampler_type": "rk4"}))
    else:
        fields |= {"sampler_kwargs": '{"scale_phi": 0.5}', "duration_padding_sec": 2}
        region = {**REGION, "keep": "model"} if job.endswith("inpaint") else {"init_noise_level": 0.4}
        form = {name: str(value) for name, value in (BODY | region | fields).items()}
        await client.post(synchronous, data=form, files={"audio": ("a.wav", make_audio_file(duration_s=1.0))})
        status = await wait(client, await submit(client, job, **region, **fields))
    assert (status["status"], status["mode"], status["steps"]) == ("succeeded", mode, 6)
    (model, direct), (job_model, queued) = backend.requests
    assert job_model == model
    for name in type(direct).__dataclass_fields__.keys() - {"request_id", "deadline_s", "init_audio", "inpaint_audio"}:
        assert getattr(queued, name) == getattr(direct, name), name
    for name in ("init_audio", "inpaint_audio"):
        source, expected = getattr(queued, name), getattr(direct, name)
        assert (source is None) == (expected is None)
        if source is not None:
            assert source.sample_rate_hz == expected.sample_rate_hz
            np.testing.assert_array_equal(source.samples, expected.samples)


@pytest.mark.parametrize("path", ["/jobs/variations", "/jobs/inpaint"])
@pytest.mark.server
async def test_upload_is_stored_unchanged_until_its_job_ends(path: str) -> None:
    async with make_client(run_jobs=False) as (client, _):
        uploads = _folder(client) / "uploads"
        await submit(client, path)
        assert [file.read_bytes() for file in uploads.iterdir()] == [make_audio_file(duration_s=1.0)]
    async with make_client() as (client, _):
        uploads = _folder(client) / "uploads"
        assert (await wait(client, await submit(client, path)))["status"] == "succeeded"
        await until(lambda: list(uploads.iterdir()) == [])


def _folder(client: httpx.AsyncClient) -> Path:
    """Returns the folder where the application stores audio files."""
    transport: Any = client._transport
    folder: str = transport.app.state.output_dir
    return Path(folder)


WAV = make_audio_file(duration_s=0.2)


@pytest.mark.parametrize(
    ("path", "fields", "audio", "status", "named"),
    [
        ("/jobs", {"prompt": " "}, None, 422, "prompt"),
        ("/jobs", {"model": "nope"}, None, 422, "model"),
        ("/jobs", {"duration": 0}, None, 422, "duration"),
        ("/jobs", {"duration": 121}, None, 422, "duration"),
        ("/jobs", {"steps": 51}, None, 422, "steps"),
        ("/jobs", {"batch_size": 5}, None, 422, "batch_size"),
        ("/jobs", {"seed": "x"}, None, 422, "seed"),
        ("/jobs", {"sampler_kwargs": {"seed": 1}}, None, 422, "sampler_kwargs"),
        ("/jobs/variations", {}, b"", 400, "audio"),
        ("/jobs/variations", {}, b"not audio", 400, "audio"),
        ("/jobs/variations", {"init_noise_level": 2}, WAV, 422, "init_noise_level"),
        ("/jobs/variations", {"model": "nope"}, WAV, 422, "model"),
        ("/jobs/variations", {"duration": 121}, WAV, 422, "duration"),
        ("/jobs/variations", {"sampler_kwargs": "[]"}, WAV, 400, "sampler_kwargs"),
        ("/jobs/inpaint", {}, WAV, 400, "inpaint_start_seconds"),
        ("/jobs/inpaint", REGION | {"inpaint_end_seconds": "0.1"}, WAV, 400, "inpaint_start_seconds"),
        ("/jobs/inpaint", REGION | {"inpaint_end_seconds": "9"}, WAV, 400, "inpaint_end_seconds"),
        ("/jobs/inpaint", REGION, b"not audio", 400, "audio"),
    ],
)
async def test_invalid_request_is_refused_and_leaves_nothing(
    client: httpx.AsyncClient,
    jobs: JobQueue,
    settings: Settings,
    path: str,
    fields: dict[str, Any],
    audio: bytes | None,
    status: int,
    named: str,
) -> None:
    before = _kept(settings, jobs)
    if audio is None:
        reply = await client.post(path, json=BODY | fields)
    else:
        form = {name: str(value) for name, value in (BODY | fields).items()}
        reply = await client.post(path, data=form, files={"audio": ("a.wav", audio)})
    assert reply.status_code == status, reply.text
    assert named in reply.text
    assert _kept(settings, jobs) == before


def _kept(settings: Settings, jobs: JobQueue) -> tuple[int, list[Path]]:
    return jobs.store.runners.outlook("").num_queued, sorted(Path(settings.output_dir).rglob("*"))


async def test_missing_upload_is_named(client: httpx.AsyncClient) -> None:
    reply = await client.post("/jobs/variations", data={"prompt": "x"}, files={"other": b"x"})
    assert reply.status_code == 422
    assert reply.json()["detail"][0]["loc"] == ["body", "audio"]


@pytest.mark.parametrize("job_id", ["0" * 32, "nope", "..%2f..%2fetc%2fpasswd", "%00", "a" * 3000, "%F0%9F%8E%B5"])
async def test_audio_of_an_unknown_id_is_404(client: httpx.AsyncClient, job_id: str) -> None:
    reply = await client.get(f"/jobs/{job_id}/audio")
    assert reply.status_code == 404
    assert isinstance(reply.json()["detail"], str)


async def test_id_of_another_dialect_is_unknown(client: httpx.AsyncClient) -> None:
    ticket = (await client.post("/queue/fal-ai/stable-audio", json={"prompt": "x"})).json()
    assert (await client.get(f"/jobs/{ticket['request_id']}")).status_code == 404


async def test_audio_before_success_is_409(client: httpx.AsyncClient) -> None:
    ticket = await submit(client)
    reply = await client.get(f"/jobs/{ticket['id']}/audio")
    assert reply.status_code == 409
    assert "queued" in reply.json()["detail"]
    assert (await client.head(f"/jobs/{ticket['id']}/audio")).status_code == 409


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (InvalidRequestError("steps must be at most 9", field="steps"), "steps must be at most 9"),
        (InvalidRequestError("a clip of 1 s takes 4 GB", field="duration"), "duration: a clip of 1 s takes 4 GB"),
        (GenerationError("the model produced silence"), "the model produced silence"),
        (RuntimeError("/secret/path"), "generation failed"),
    ],
)
async def test_failed_job_gives_the_reason(
    client: httpx.AsyncClient, backend: ToneBackend, runner: JobRunner, error: Exception, shown: str
) -> None:
    backend.error = error
    ticket = await submit(client)
    status = await wait(client, ticket)
    assert status["status"] == "failed"
    assert shown in status["error"]
    assert "secret" not in status["error"]
    assert status["completed_at"] is not None
    assert (status["download_url"], status["storage_key"]) == (None, None)
    assert (await client.get(f"/jobs/{ticket['id']}/audio")).status_code == 409


async def test_head_gives_the_length_of_the_audio(client: httpx.AsyncClient, runner: JobRunner) -> None:
    url = (await wait(client, await submit(client)))["download_url"]
    reply, head = await client.get(url), await client.head(url)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(len(reply.content))
    assert head.headers["content-type"] == reply.headers["content-type"]
    assert (await client.head(f"/jobs/{'0' * 32}/audio")).status_code == 404


async def test_deleted_audio_is_404(client: httpx.AsyncClient, settings: Settings, runner: JobRunner) -> None:
    ticket = await submit(client)
    status = await wait(client, ticket)
    (Path(settings.output_dir) / f"{ticket['id']}-stable-audio-3-small-sfx.wav").unlink()
    reply = await client.get(status["download_url"])
    assert reply.status_code == 404
    assert "no longer exists" in reply.json()["detail"]


async def test_full_queue_is_refused_with_retry_after() -> None:
    async with make_client(run_jobs=False, jobs={"max_queued": 1}) as (client, _):
        await submit(client)
        reply = await client.post("/jobs", json=BODY)
        assert reply.status_code == 503
        assert int(reply.headers["retry-after"]) > 0
        upload = {"audio": ("a.wav", WAV)}
        assert (await client.post("/jobs/variations", data={"prompt": "x"}, files=upload)).status_code == 503
        assert list((_folder(client) / "uploads").iterdir()) == []


async def test_unwritable_folder_is_503_with_retry_after(tmp_path: Path) -> None:
    (tmp_path / "occupied").write_text("no folder")
    async with make_client(run_jobs=False, output_dir=str(tmp_path / "occupied")) as (client, _):
        for reply in (
            await client.post("/jobs", json=BODY),
            await client.post("/jobs/variations", data={"prompt": "x"}, files={"audio": ("a.wav", WAV)}),
        ):
            assert reply.status_code == 503, reply.text
            assert int(reply.headers["retry-after"]) > 0
            assert "occupied" not in reply.text
