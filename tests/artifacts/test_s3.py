"""Faults that only a bucket can have. The tests that run for every kind of file store are in `test_stores`."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import os
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from functools import partial
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest
from botocore.retries.standard import ExponentialBackoff

from stable_audio_serve.artifacts import s3
from stable_audio_serve.artifacts.keys import FOLDERS, artifact_key, new_key
from stable_audio_serve.artifacts.s3 import S3Artifacts
from stable_audio_serve.artifacts.s3_client import check_bucket
from stable_audio_serve.artifacts.store import StoredFile
from stable_audio_serve.core.errors import ConfigError, StorageError, StorageFullError
from stable_audio_serve.core.settings import StorageSettings
from tests.object_storage import SECRET_ACCESS_KEY, Faults, ObjectStorage
from tests.patience import PATIENCE_S, until

pytestmark = pytest.mark.server

MIB = 1_048_576
KEY = artifact_key("0" * 32, "a.wav", fence=1)
EVERYTHING = ("s3:*",)


@pytest.fixture
def bucket(object_storage: ObjectStorage) -> str:
    return object_storage.make_bucket()


@pytest.fixture
async def store(object_storage: ObjectStorage, bucket: str) -> AsyncIterator[S3Artifacts]:
    store = S3Artifacts(object_storage.settings(bucket, prefix="p"))
    yield store
    await store.close()


async def put(store: S3Artifacts, data: bytes, *, key: str = KEY) -> StoredFile:
    pieces = [data[start : start + MIB] for start in range(0, len(data), MIB)]
    return await store.put(key, lambda: pieces, media_type="audio/wav", file_name="größe.wav")


async def read(store: S3Artifacts, file: StoredFile) -> bytes:
    return b"".join([chunk async for chunk in store.read(file)])


async def test_without_a_prefix_keys_are_at_the_top(object_storage: ObjectStorage, bucket: str) -> None:
    store = S3Artifacts(object_storage.settings(bucket, prefix=""))
    file, upload = await put(store, b"x"), await put(store, b"y", key=new_key("uploads"))
    object_storage.client.put_object(Bucket=bucket, Key="holiday.jpg", Body=b"")
    object_storage.client.create_multipart_upload(Bucket=bucket, Key="uploads/holiday.jpg")
    assert store.bucket_key(file) == file.key
    assert [[item.key for item in store.list_folder(name).objects] for name in FOLDERS] == [[KEY], [upload.key], [], []]
    assert store.sweep_unfinished(before=time.time() + 60) == 0
    assert store.claim("me") is not None
    assert await read(store, file) == b"x"


@pytest.mark.parametrize("num_bytes", [100, 17 * MIB])
async def test_objects_carry_type_name_and_digest(
    object_storage: ObjectStorage, store: S3Artifacts, bucket: str, num_bytes: int
) -> None:
    file = await put(store, bytes(num_bytes))
    assert store.bucket_key(file) == f"p/{KEY}"
    head = object_storage.client.head_object(Bucket=bucket, Key=f"p/{KEY}")
    assert (head["ContentType"], head["ContentLength"]) == ("audio/wav", num_bytes)
    assert head["ContentDisposition"] == 'attachment; filename="gr__e.wav"'
    assert head["Metadata"] == {"sha256": file.sha256}


async def test_only_large_files_use_multipart_uploads(object_storage: ObjectStorage, store: S3Artifacts) -> None:
    await put(store, bytes(16 * MIB))
    assert not any("upload" in request for request in object_storage.proxy.requests)
    await put(store, bytes(16 * MIB + 1))
    assert sum("partNumber=" in request for request in object_storage.proxy.requests) == 3


async def test_errors_and_broken_connections_are_retried(
    object_storage: ObjectStorage, store: S3Artifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    delay_s = ExponentialBackoff.delay_amount
    monkeypatch.setattr(ExponentialBackoff, "delay_amount", lambda *args: 0.05 * delay_s(*args))
    proxy = object_storage.proxy
    num_before = proxy.num_errors, proxy.num_cuts
    proxy.faults = Faults(errors=0.1, cuts=0.05)
    data = {new_key("uploads"): os.urandom(size) for size in [1000] * 20 + [3 * MIB] * 2 + [17 * MIB]}
    files = await asyncio.gather(*(put(store, content, key=key) for key, content in data.items()))
    for file, content in zip(files, data.values(), strict=True):
        assert await read(store, file) == content
    await asyncio.gather(*(store.delete(file.key) for file in files))
    assert proxy.num_errors - num_before[0] > 2
    assert proxy.num_cuts > num_before[1]


async def test_interrupted_download_resumes(object_storage: ObjectStorage, store: S3Artifacts) -> None:
    data = os.urandom(6 * MIB)
    file = await put(store, data)
    object_storage.proxy.fates["GET"] = "cut-answer"
    assert await read(store, file) == data
    assert sum(request.startswith("GET") for request in object_storage.proxy.requests) == 2
    object_storage.proxy.fates["GET"] = "cut-answer"
    part = store.read_part(file, start=MIB + 5, stop=6 * MIB - 3)
    assert b"".join([chunk async for chunk in part]) == data[MIB + 5 : 6 * MIB - 3]
    assert sum(request.startswith("GET") for request in object_storage.proxy.requests) == 4


async def test_service_that_ignores_ranges_sends_no_wrong_bytes(
    object_storage: ObjectStorage, store: S3Artifacts
) -> None:
    file = await put(store, os.urandom(6 * MIB))
    object_storage.proxy.faults = Faults(ignores_ranges=True)
    with pytest.raises(StorageError, match="Range"):
        await anext(store.read_part(file, start=2 * MIB, stop=3 * MIB))
    object_storage.proxy.fates["GET"] = "cut-answer"
    with pytest.raises(StorageError, match="Range"):
        await read(store, file)


async def test_file_deleted_during_a_download_is_an_error(object_storage: ObjectStorage, store: S3Artifacts) -> None:
    file = await put(store, os.urandom(6 * MIB))
    object_storage.proxy.fates["GET"] = "cut-answer"
    chunks = store.read(file)
    await anext(chunks)
    await store.delete(file.key)

    async def read_the_rest() -> None:
        async for _ in chunks:
            pass

    with pytest.raises(StorageError, match="deleted"):
        await read_the_rest()


async def test_a_service_that_is_down_is_a_storage_error_in_bounded_time(
    object_storage: ObjectStorage, store: S3Artifacts
) -> None:
    file = await put(store, b"x")
    object_storage.proxy.faults = Faults(is_down=True)
    started_at = time.monotonic()
    for doing in (put(store, b"x"), read(store, file)):
        with pytest.raises(StorageError, match="object storage cannot be used now") as caught:
            await doing
        assert caught.value.retry_after_s
    assert time.monotonic() - started_at < 90
    object_storage.proxy.faults = Faults()
    assert await read(store, file) == b"x"


async def test_upload_to_a_silent_service_asks_nothing_more(
    object_storage: ObjectStorage, store: S3Artifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "make_client", partial(s3.make_client, read_timeout_s=0.1, max_attempts=2))
    object_storage.proxy.faults = Faults(is_silent=True)
    with pytest.raises(StorageError, match="ReadTimeoutError"):
        await put(store, b"x")
    assert {request.split()[0] for request in object_storage.proxy.requests} == {"PUT"}


async def test_other_callers_do_not_wait_for_a_silent_service(
    object_storage: ObjectStorage, store: S3Artifacts
) -> None:
    object_storage.proxy.faults = Faults(is_silent=True)
    puts = [asyncio.create_task(put(store, b"x", key=new_key("uploads"))) for _ in range(50)]
    await asyncio.sleep(0.2)
    async with asyncio.timeout(PATIENCE_S):
        await asyncio.to_thread(time.monotonic)
    assert not any(task.done() for task in puts)
    object_storage.proxy.faults = Faults()
    await asyncio.gather(*puts)


@pytest.mark.parametrize(
    ("status", "code"), [(507, "InsufficientStorage"), (403, "QuotaExceeded"), (507, "XMinioStorageFull")]
)
async def test_full_service_is_reported(
    object_storage: ObjectStorage, store: S3Artifacts, bucket: str, status: int, code: str
) -> None:
    object_storage.proxy.faults = Faults(answer=(status, code))
    with pytest.raises(StorageFullError, match=r"^the object storage is full$"):
        await put(store, b"x")
    assert object_storage.keys(bucket) == []


async def test_service_that_redirects_every_request_is_reported(
    object_storage: ObjectStorage, store: S3Artifacts, bucket: str
) -> None:
    """For example a proxy that redirects HTTP to HTTPS."""
    object_storage.proxy.faults = Faults(answer=(301, "PermanentRedirect"))
    with pytest.raises(StorageError, match=r"^the object storage cannot be used now \(PermanentRedirect\)$"):
        await put(store, b"x")
    assert len(object_storage.proxy.requests) < 10  # botocore does not look for another region again and again
    message = check(object_storage, bucket)
    assert message.startswith("storage.endpoint_url")
    assert "redirects requests" in message


@pytest.mark.parametrize("failing", ["partNumber=2", "partNumber=3", "POST /{at}?uploadId="])
async def test_failed_multipart_upload_leaves_nothing(
    object_storage: ObjectStorage, store: S3Artifacts, bucket: str, failing: str
) -> None:
    object_storage.proxy.fates[failing.format(at=f"{bucket}/p/{KEY}")] = "deny"
    with pytest.raises(StorageError, match="AccessDenied"):
        await put(store, bytes(17 * MIB))
    assert object_storage.proxy.fates == {}
    assert object_storage.unfinished(bucket) == []
    assert object_storage.keys(bucket) == []


@pytest.mark.parametrize("fate", ["error-after", "lost"])
async def test_completion_with_a_lost_response_counts(
    object_storage: ObjectStorage, store: S3Artifacts, bucket: str, fate: str
) -> None:
    data = os.urandom(17 * MIB)
    object_storage.proxy.fates[f"POST /{bucket}/p/{KEY}?uploadId="] = fate
    file = await put(store, data)
    assert await read(store, file) == data
    assert object_storage.unfinished(bucket) == []


@pytest.mark.parametrize(
    ("request_text", "num_mib"),
    [("PUT", 1), ("?uploads", 17), ("partNumber=2", 17)],
    ids=["put", "begin", "part"],
)
async def test_success_that_is_not_the_service_s_own_is_an_error(
    object_storage: ObjectStorage, store: S3Artifacts, request_text: str, num_mib: int
) -> None:
    """A misdirected proxy may answer every request with an empty page. Then the file is not stored."""
    object_storage.proxy.fates[request_text] = "swallow"
    with pytest.raises(StorageError):
        await put(store, bytes(num_mib * MIB))


@pytest.mark.parametrize("num_pieces", [1, 17])
async def test_file_that_changes_during_upload_is_refused(
    object_storage: ObjectStorage, store: S3Artifacts, bucket: str, num_pieces: int
) -> None:
    with pytest.raises(StorageError, match="changed"):
        await store.put(KEY, lambda: [os.urandom(MIB)] * num_pieces, media_type="audio/wav", file_name="a.wav")
    assert (object_storage.keys(bucket), object_storage.unfinished(bucket)) == ([], [])


async def test_a_put_cancelled_between_two_parts_leaves_nothing(
    object_storage: ObjectStorage, store: S3Artifacts, bucket: str
) -> None:
    """The store aborts the multipart upload, so the service deletes the parts that it has received."""
    num_taken, resumed = 0, threading.Event()

    def chunks() -> Iterator[bytes]:
        nonlocal num_taken
        for num_taken in range(1, 61):
            yield bytes(MIB)
            if num_taken == 26 and object_storage.unfinished(bucket):
                resumed.wait(PATIENCE_S)

    task = asyncio.create_task(store.put(KEY, chunks, media_type="audio/wav", file_name="a.wav"))
    parts = object_storage.proxy.requests
    await until(lambda: num_taken == 26 and sum("partNumber=" in request for request in parts) >= 2)
    task.cancel()
    await asyncio.sleep(0.05)
    resumed.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert num_taken <= 27
    assert (object_storage.keys(bucket), object_storage.unfinished(bucket)) == ([], [])


async def test_upload_that_cannot_be_aborted_is_swept_when_old(
    object_storage: ObjectStorage, store: S3Artifacts, bucket: str
) -> None:
    foreign = {"Bucket": bucket, "Key": "p/holiday.mp4"}
    object_storage.client.create_multipart_upload(**foreign)
    object_storage.client.create_multipart_upload(Bucket=bucket, Key=f"elsewhere/{KEY}")
    object_storage.proxy.faults = Faults(answer=(403, "AccessDenied"), only="uploadId=")
    with pytest.raises(StorageError):
        await put(store, bytes(17 * MIB))
    object_storage.proxy.faults = Faults()
    assert len(object_storage.unfinished(bucket)) == 3
    assert await asyncio.to_thread(lambda: store.sweep_unfinished(before=time.time() - 60)) == 0
    assert await asyncio.to_thread(lambda: store.sweep_unfinished(before=time.time() + 60)) == 1
    assert sorted(object_storage.unfinished(bucket)) == sorted([f"elsewhere/{KEY}", "p/holiday.mp4"])


@pytest.mark.parametrize("region", ["us-east-1", "auto", "eu-west-1"])
@pytest.mark.parametrize("addressing", ["path", "virtual"])
def test_links_are_signed_by_version_4(region: str, addressing: str) -> None:
    settings = StorageSettings.model_validate(
        {
            "bucket": "music",
            "region": region,
            "addressing": addressing,
            "endpoint_url": "https://x.r2.example",
            "access_key_id": "id",
            "secret_access_key": "secret",
            "presigned_url_expires_s": 77,
        }
    )
    file = StoredFile("a b.wav", "audio/wav", "a.wav", 1, "")
    url = urlsplit(S3Artifacts(settings).url(file))
    assert (url.scheme, url.netloc, url.path) == {
        "path": ("https", "x.r2.example", "/music/stable-audio/jobs/a%20b.wav"),
        "virtual": ("https", "music.x.r2.example", "/stable-audio/jobs/a%20b.wav"),
    }[addressing]
    query = {name: values[0] for name, values in parse_qs(url.query).items()}
    assert (query["X-Amz-Algorithm"], query["X-Amz-Expires"]) == ("AWS4-HMAC-SHA256", "77")
    assert query["X-Amz-Credential"].split("/")[0::2] == ["id", region, "aws4_request"]


def test_links_to_aws_name_the_bucket_in_the_host() -> None:
    settings = StorageSettings.model_validate({"bucket": "music", "access_key_id": "i", "secret_access_key": "s"})
    url = urlsplit(S3Artifacts(settings).url(StoredFile("k", "audio/wav", "a.wav", 1, "")))
    assert (url.netloc, url.path) == ("music.s3.amazonaws.com", "/stable-audio/jobs/k")
    assert "X-Amz-Algorithm=AWS4-HMAC-SHA256" in url.query


def signature(url: str, *, secret: str) -> str:
    """Returns the signature (AWS version 4) of a presigned GET URL, computed as AWS documents."""
    parts = urlsplit(url)
    query = "&".join(sorted(item for item in parts.query.split("&") if not item.startswith("X-Amz-Signature=")))
    values = {name: values[0] for name, values in parse_qs(parts.query).items()}
    _, scope = values["X-Amz-Credential"].split("/", 1)
    request = "\n".join(("GET", parts.path, query, f"host:{parts.netloc}", "", "host", "UNSIGNED-PAYLOAD"))
    digest = hashlib.sha256(request.encode()).hexdigest()
    text = "\n".join(("AWS4-HMAC-SHA256", values["X-Amz-Date"], scope, digest))
    key = f"AWS4{secret}".encode()
    for part in (*scope.split("/"), text):
        key = hmac.digest(key, part.encode(), "sha256")
    return key.hex()


async def test_a_presigned_link_is_enough_for_a_plain_client(object_storage: ObjectStorage, store: S3Artifacts) -> None:
    data = os.urandom(100_000)
    url = store.url(await put(store, data))
    async with httpx.AsyncClient(timeout=PATIENCE_S) as client:
        answer = await client.get(url)
        assert (answer.status_code, answer.content) == (200, data)
        assert answer.headers["content-type"] == "audio/wav"
        assert answer.headers["content-disposition"] == 'attachment; filename="gr__e.wav"'
        assert (await client.get(url.partition("?")[0])).status_code == 403
    assert f"X-Amz-Signature={signature(url, secret=SECRET_ACCESS_KEY)}" in url
    assert f"X-Amz-Signature={signature(url, secret='another')}" not in url


@pytest.mark.parametrize("base", ["https://cdn.example/audio", "https://cdn.example/audio/"])
async def test_a_public_base_needs_no_signature(object_storage: ObjectStorage, bucket: str, base: str) -> None:
    store = S3Artifacts(object_storage.settings(bucket, public_base_url=base, prefix="/p/q/"))
    assert store.url(StoredFile("uploads/x", "", "", 1, "")) == "https://cdn.example/audio/p/q/uploads/x"


def check(storage: ObjectStorage, bucket: str, **overrides: Any) -> str:
    """Run the check that a starting server runs on its bucket settings. Returns the error message."""
    started_at = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        S3Artifacts(storage.settings(bucket, **overrides)).check()
    assert time.monotonic() - started_at < 60  # with its default settings, boto3 would retry for two minutes
    return plain(caught.value)


def check_soon(storage: ObjectStorage, bucket: str, **overrides: Any) -> str:
    """Like `check`, but with a shorter time limit."""
    with pytest.raises(ConfigError) as caught:
        check_bucket(storage.settings(bucket, **overrides), prefix="", budget_s=1.0)
    return plain(caught.value)


def plain(error: ConfigError) -> str:
    assert "\n" not in error.message
    assert "secret" not in error.message.replace("secret_access_key", "")
    return error.message


def test_a_missing_bucket_is_detected_at_startup(object_storage: ObjectStorage) -> None:
    message = check(object_storage, "no-such-bucket")
    assert message.startswith("storage.bucket (STABLE_AUDIO_STORAGE_BUCKET")
    assert "no-such-bucket" in message


def test_an_impossible_bucket_is_detected_at_startup(object_storage: ObjectStorage) -> None:
    assert check(object_storage, "no bucket/at all").startswith("storage.bucket (")


def test_a_bad_key_is_detected_at_startup(object_storage: ObjectStorage, bucket: str) -> None:
    with object_storage.requiring_keys(*EVERYTHING) as (key, secret):
        S3Artifacts(object_storage.settings(bucket, access_key_id=key, secret_access_key=secret)).check()
        for pair in ((key, "another-secret"), ("AKIAUNKNOWN", secret)):
            message = check(object_storage, bucket, access_key_id=pair[0], secret_access_key=pair[1])
            assert message.startswith("storage.access_key_id (AWS_ACCESS_KEY_ID")
            assert "does not accept" in message


def test_a_wrong_clock_is_detected_at_startup(object_storage: ObjectStorage, bucket: str) -> None:
    object_storage.proxy.faults = Faults(answer=(403, "RequestTimeTooSkewed"))
    message = check(object_storage, bucket)
    assert "correct its clock" in message
    assert "access_key_id" not in message


@pytest.mark.parametrize(
    ("allowed", "missing"),
    [
        (("s3:GetObject", "s3:ListBucket", "s3:DeleteObject"), "writing"),
        (("s3:PutObject", "s3:ListBucket", "s3:DeleteObject"), "reading"),
        (("s3:PutObject", "s3:GetObject", "s3:DeleteObject"), "listing"),
        (("s3:PutObject", "s3:GetObject", "s3:ListBucket"), "deleting"),
    ],
)
def test_key_without_permissions_is_detected_at_startup(
    object_storage: ObjectStorage, bucket: str, allowed: tuple[str, ...], missing: str
) -> None:
    with object_storage.requiring_keys(*allowed) as (key, secret):
        assert f"does not allow {missing}" in check(object_storage, bucket, access_key_id=key, secret_access_key=secret)


def test_missing_key_is_detected_at_startup(
    object_storage: ObjectStorage, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", "/nonexistent")
    message = check(object_storage, bucket, access_key_id=None, secret_access_key=None)
    assert "no access key" in message


@pytest.fixture
def closed_port() -> Iterator[int]:
    with socket.socket() as listener:  # the port is taken but nothing listens, so connections are refused
        listener.bind(("127.0.0.1", 0))
        yield listener.getsockname()[1]


def test_an_unreachable_endpoint_is_detected_at_startup(
    object_storage: ObjectStorage, bucket: str, closed_port: int
) -> None:
    for url in (f"http://127.0.0.1:{closed_port}", "http://no-such-host.invalid"):
        message = check_soon(object_storage, bucket, endpoint_url=url)
        assert message.startswith("storage.endpoint_url (STABLE_AUDIO_STORAGE_ENDPOINT_URL")
        assert url in message
        assert "cannot be reached" in message


def test_a_silent_endpoint_is_detected_at_startup(object_storage: ObjectStorage, bucket: str) -> None:
    object_storage.proxy.faults = Faults(is_silent=True)
    assert "cannot be reached" in check_soon(object_storage, bucket)


def test_server_errors_are_retried_for_some_time(object_storage: ObjectStorage, bucket: str) -> None:
    object_storage.proxy.faults = Faults(errors=0.3, cuts=0.1)
    S3Artifacts(object_storage.settings(bucket)).check()
    object_storage.proxy.faults = Faults(answer=(503, "SlowDown"))
    message = check_soon(object_storage, bucket)
    assert message.startswith("storage.endpoint_url (")
    assert "503" in message


@pytest.mark.parametrize(
    ("overrides", "named"), [({"region": "not a region!"}, "storage.region"), ({"region": "auto"}, None)]
)
def test_invalid_region_is_detected_at_startup(
    object_storage: ObjectStorage, bucket: str, overrides: dict[str, str], named: str | None
) -> None:
    if named:
        assert check(object_storage, bucket, **overrides).startswith(named)
    else:
        S3Artifacts(object_storage.settings(bucket, **overrides)).check()


def test_other_region_is_detected_at_startup(object_storage: ObjectStorage, bucket: str) -> None:
    """botocore would find the bucket's region for requests, but sign links for the configured one."""
    object_storage.proxy.faults = Faults(region="eu-west-1")
    assert check(object_storage, bucket, region="us-east-1").startswith("storage.region")
    S3Artifacts(object_storage.settings(bucket, region="eu-west-1")).check()


async def test_boto3_is_imported_on_first_use_only() -> None:
    code = (
        "import sys, stable_audio_serve.jobs.open as q; from stable_audio_serve.core.settings import Settings; "
        "q.open_artifacts(Settings.model_validate({'storage': {'bucket': 'b'}})); "
        "sys.exit('boto3' in sys.modules or 'botocore' in sys.modules)"
    )
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code)
    assert await process.wait() == 0
