"""Jobs and download links when the audio files are in an object storage bucket."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import httpx
import pytest

from tests.api.compat.serving import make_client, make_hasty_client, serve_app
from tests.backends import ToneBackend
from tests.object_storage import Faults, ObjectStorage
from tests.patience import PATIENCE_S, until

pytestmark = pytest.mark.server

BODY = {"prompt": "rain", "duration": 1, "seed": 7}


@pytest.fixture
def bucket(object_storage: ObjectStorage) -> str:
    return object_storage.make_bucket()


def storage_args(storage: ObjectStorage, bucket: str, **overrides: Any) -> dict[str, Any]:
    args = storage.settings(bucket, **overrides).model_dump(exclude_unset=True)
    return args | {name: args[name].get_secret_value() for name in ("access_key_id", "secret_access_key")}


async def finished(client: httpx.AsyncClient, job_id: str) -> dict[str, Any]:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            status: dict[str, Any] = (await client.get(f"/jobs/{job_id}")).json()
            if status["completed_at"]:
                return status
            await asyncio.sleep(0.02)


@pytest.mark.parametrize(
    ("batch_size", "name", "media_type"),
    [(1, "stable-audio-3-small-sfx.wav", "audio/wav"), (2, "stable-audio-3-small-sfx-batch.zip", "application/zip")],
)
async def test_job_ends_with_a_presigned_link(
    object_storage: ObjectStorage, bucket: str, batch_size: int, name: str, media_type: str
) -> None:
    async with make_client(storage=storage_args(object_storage, bucket, prefix="/audio/")) as (client, _):
        job_id = (await client.post("/jobs", json=BODY | {"batch_size": batch_size})).json()["id"]
        queued = (await client.get(f"/jobs/{job_id}")).json()
        assert queued["storage_backend"] == "s3"
        status = await finished(client, job_id)
        assert (status["status"], status["storage_backend"]) == ("succeeded", "s3")
        assert status["storage_key"] == f"audio/{job_id}-{name}"
        assert status["download_content_type"] == media_type
        assert "X-Amz-Algorithm=AWS4-HMAC-SHA256" in status["download_url"]
        assert "X-Amz-Expires=3600" in status["download_url"]
        async with httpx.AsyncClient(timeout=PATIENCE_S) as plain:
            fetched = await plain.get(status["download_url"])
        assert (fetched.status_code, fetched.headers["content-type"]) == (200, media_type)
        assert fetched.headers["content-disposition"] == f'attachment; filename="{job_id}-{name}"'
        direct = await client.post("/v1/audio/generations", json=BODY | {"batch_size": batch_size})
        assert fetched.content == direct.content
        through = await client.get(f"/jobs/{job_id}/audio")
        assert (through.content, through.headers["content-type"]) == (direct.content, media_type)
        assert object_storage.keys(bucket) == [status["storage_key"]]


async def test_links_lead_to_the_server_if_configured(object_storage: ObjectStorage, bucket: str) -> None:
    async with make_client(storage=storage_args(object_storage, bucket, links="server")) as (client, _):
        status = await finished(client, (await client.post("/jobs", json=BODY)).json()["id"])
        assert (status["storage_backend"], len(object_storage.keys(bucket))) == ("s3", 1)
        assert status["download_url"] == f"http://localhost/jobs/{status['id']}/audio"
        direct = await client.post("/v1/audio/generations", json=BODY)
        assert (await client.get(status["download_url"])).content == direct.content


async def test_public_base_url_gives_plain_links(object_storage: ObjectStorage, bucket: str) -> None:
    args = storage_args(object_storage, bucket, prefix="", public_base_url="https://cdn.example/x/")
    async with make_client(storage=args) as (client, _):
        status = await finished(client, (await client.post("/jobs", json=BODY)).json()["id"])
        assert status["storage_key"] == f"{status['id']}-stable-audio-3-small-sfx.wav"
        assert status["download_url"] == f"https://cdn.example/x/{status['storage_key']}"


async def test_links_of_other_dialects_lead_to_the_server(object_storage: ObjectStorage, bucket: str) -> None:
    async with make_client(storage=storage_args(object_storage, bucket)) as (client, _):
        output = (await client.post("/fal/fal-ai/stable-audio", json={"prompt": "rain", "seconds_total": 1})).json()
        url = output["audio_file"]["url"]
        assert re.search(r"/files/[0-9a-f]{32}/", url)
        answer = await client.get(url)
        assert (answer.status_code, len(answer.content)) == (200, output["audio_file"]["file_size"])
        assert answer.headers["content-length"] == str(len(answer.content))


async def test_upload_stays_in_the_bucket_until_its_job_ends(object_storage: ObjectStorage, bucket: str) -> None:
    backend = ToneBackend()
    async with make_client(backend, storage=storage_args(object_storage, bucket)) as (client, _):
        audio = (await client.post("/v1/audio/generations", json=BODY)).content
        backend.released.clear()
        ticket = await client.post("/jobs/variations", data={"prompt": "x", "duration": "1"}, files={"audio": audio})
        assert ticket.status_code == 202, ticket.text
        assert [key.split("/")[2] for key in object_storage.keys(bucket)] == ["uploads"]
        backend.released.set()
        status = await finished(client, ticket.json()["id"])
        assert status["status"] == "succeeded"
        await until(lambda: object_storage.keys(bucket) == [status["storage_key"]])


UNREADABLE = [Faults(answer=(403, "AccessDenied"), only="GET"), Faults(truncates=True, only="GET")]


def num_probes(storage: ObjectStorage) -> int:
    """Returns how many files like those of the runner's probes were written. A job's upload counts too."""
    return sum("PUT" in request and "/uploads/" in request for request in storage.proxy.requests)


@pytest.mark.parametrize("faults", UNREADABLE, ids=["denied", "truncated"])
async def test_unreadable_bucket_makes_no_dead_letters(
    object_storage: ObjectStorage, bucket: str, faults: Faults
) -> None:
    """The bucket still accepts files, so a successful write does not prove that jobs can read their uploads again."""
    async with make_hasty_client(storage=storage_args(object_storage, bucket)) as (client, _):
        audio = (await client.post("/v1/audio/generations", json=BODY)).content
        object_storage.proxy.faults = faults
        ticket = await client.post("/jobs/variations", data={"prompt": "x", "duration": "1"}, files={"audio": audio})
        await until(lambda: num_probes(object_storage) >= 3)
        object_storage.proxy.faults = Faults()
        status = await finished(client, ticket.json()["id"])
        assert (status["status"], status["attempts"]) == ("succeeded", 2)


@pytest.mark.parametrize("faults", UNREADABLE, ids=["denied", "truncated"])
async def test_unreadable_bucket_fails_no_long_piece(
    object_storage: ObjectStorage, bucket: str, faults: Faults
) -> None:
    async with make_hasty_client(storage=storage_args(object_storage, bucket)) as (client, _):
        object_storage.proxy.faults = faults
        piece = {"prompt": "x", "sections": [{"duration": 1}, {"duration": 1}], "overlap_s": 0.5}
        ticket = await client.post("/jobs", json=piece)
        await until(lambda: num_probes(object_storage) >= 3)
        object_storage.proxy.faults = Faults()
        status = await finished(client, ticket.json()["id"])
        assert (status["status"], status["error"]) == ("succeeded", None)


async def test_damaged_object_is_never_downloaded_complete(object_storage: ObjectStorage, bucket: str) -> None:
    """Downloading a short damaged object is an error. Downloading a long one ends early, which clients notice."""
    async with (
        serve_app(storage=storage_args(object_storage, bucket, prefix="")) as (port, _),
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_S) as client,
    ):
        for seconds in (1, 30):
            body = {"prompt": "rain", "seconds_total": seconds}
            url = (await client.post("/fal/fal-ai/stable-audio", json=body)).json()["audio_file"]["url"]
            (key,) = object_storage.keys(bucket)
            data = bytearray(object_storage.read(bucket, key))
            data[-1] ^= 1
            object_storage.client.put_object(Bucket=bucket, Key=key, Body=bytes(data))
            if seconds == 1:
                answer = await client.get(url)
                assert answer.status_code in (503, 507)
                assert "damaged" in answer.json()["detail"]
            else:
                with pytest.raises(httpx.RemoteProtocolError):
                    await client.get(url)
            object_storage.client.delete_object(Bucket=bucket, Key=key)
            assert (await client.get(url)).status_code == 404


async def test_unavailable_service_is_5xx_with_a_sentence(object_storage: ObjectStorage, bucket: str) -> None:
    async with make_client(storage=storage_args(object_storage, bucket)) as (client, _):
        audio = (await client.post("/v1/audio/generations", json=BODY)).content
        object_storage.proxy.faults = Faults(is_down=True)
        answer = await client.post("/jobs/variations", data={"prompt": "x", "duration": "1"}, files={"audio": audio})
        assert answer.status_code in (503, 507)
        assert "object storage" in answer.json()["detail"]
        assert "127.0.0.1" not in answer.text
