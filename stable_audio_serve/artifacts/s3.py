"""Store files in a bucket of S3, R2 or a compatible service, each under `<prefix>/<key>`."""

from __future__ import annotations

import hashlib
import io
import threading
from collections.abc import Generator, Iterable, Mapping
from contextlib import closing
from typing import Any
from urllib.parse import quote

import structlog

from stable_audio_serve.artifacts.keys import OWNER_KEY, is_ours, new_key
from stable_audio_serve.artifacts.s3_client import (
    check_bucket,
    is_missing,
    is_timeout,
    make_client,
    s3_errors,
    status_of,
    storage_errors,
)
from stable_audio_serve.artifacts.store import (
    MAX_LISTED,
    PROBE_BYTES,
    READ_BYTES,
    ArtifactStore,
    Chunks,
    ObjectPage,
    StoredFile,
    StoredObject,
    StoreThreads,
    require_size,
    until_stopped,
)
from stable_audio_serve.core.errors import StorageError
from stable_audio_serve.core.failpoints import failpoint
from stable_audio_serve.core.file_names import content_disposition
from stable_audio_serve.core.ids import ArtifactKey
from stable_audio_serve.core.metrics import Metrics
from stable_audio_serve.core.settings import StorageSettings

log = structlog.get_logger("stable_audio_serve.artifacts")

_NUM_THREADS = 16
_MULTIPART_ABOVE_BYTES = 16 * 2**20
_PART_BYTES = 8 * 2**20
_NOT_IMPLEMENTED = 501
_LOST_RACE = (409, 412)  # HTTP conflict, precondition failed: another process wrote the object first
_MAX_BREAKS = 5  # a download fails if its connection breaks more often than this without delivering a byte in between


class S3Artifacts(ArtifactStore):
    """Files in one existing bucket. `ArtifactStore` documents the methods."""

    backend_name = "s3"

    def __init__(self, settings: StorageSettings, *, metrics: Metrics | None = None) -> None:
        """Create the store without any I/O. `settings` must name a bucket."""
        super().__init__(StoreThreads(_NUM_THREADS, name="s3-files"), metrics=metrics)
        self._settings = settings
        self._prefix = f"{settings.prefix}/" if settings.prefix else ""
        self._lock = threading.Lock()
        self._made_client: Any = None

    def __str__(self) -> str:
        return f"bucket {self._settings.bucket} of {self._settings.endpoint_url or 'AWS S3'}"

    def check(self) -> None:
        check_bucket(self._settings, prefix=self._prefix)

    def url(self, file: StoredFile) -> str | None:
        """Return a link to the object: under the setting `public_base_url`, or presigned if this setting is not set.

        Returns None if the setting `links` is "server", because clients then get links to this server. Raises
        StorageError if there are no credentials for signing.
        """
        if self._settings.links == "server":
            return None
        if base := self._settings.public_base_url:
            return f"{base.rstrip('/')}/{quote(self.bucket_key(file))}"
        with storage_errors("sign"):
            url: str = self._client.generate_presigned_url(
                "get_object", Params=self._at(file.key), ExpiresIn=self._settings.presigned_url_expires_s
            )
        return url

    def bucket_key(self, file: StoredFile) -> str:
        return self._prefix + file.key

    def claim(self, owner: str) -> float | None:
        at = self._at(OWNER_KEY)
        with storage_errors("claim"):
            try:
                found = self._client.get_object(**at)
            except self._client.exceptions.NoSuchKey:
                self._put_if_missing(at, owner.encode())
                found = self._client.get_object(**at)
            is_owned = found["Body"].read() == owner.encode()
        since: float = found["LastModified"].timestamp()
        return since if is_owned else None

    def fetch(self, key: ArtifactKey, *, max_bytes: int) -> bytes | None:
        with storage_errors("fetch"):
            if (found := self._open(key)) is None:
                return None
            with closing(found) as body:
                data: bytes = body.read(max_bytes + 1)
        return require_size(data, max_bytes)

    def list_folder(self, folder: str, *, cursor: str | None = None, limit: int = MAX_LISTED) -> ObjectPage:
        prefix = f"{self._prefix}{folder}/" if folder else self._prefix
        options: dict[str, Any] = {"ContinuationToken": cursor} if cursor else {}
        with storage_errors("list"):
            page = self._client.list_objects_v2(
                Bucket=self._settings.bucket, Prefix=prefix, Delimiter="/", MaxKeys=limit, **options
            )
        objects = (
            StoredObject(self._key_of(item), item["LastModified"].timestamp()) for item in page.get("Contents", ())
        )
        return ObjectPage(tuple(item for item in objects if is_ours(item.key)), page.get("NextContinuationToken"))

    def sweep_unfinished(self, *, before: float) -> int:
        num_aborted = 0
        with storage_errors("sweep"):
            pages = self._client.get_paginator("list_multipart_uploads").paginate(
                Bucket=self._settings.bucket, Prefix=self._prefix
            )
            for upload in (upload for page in pages for upload in page.get("Uploads", ())):
                key = self._key_of(upload)
                if is_ours(key) and upload["Initiated"].timestamp() <= before:
                    self._abort(key, upload["UploadId"])
                    num_aborted += 1
        return num_aborted

    @property
    def _client(self) -> Any:
        with self._lock:
            if self._made_client is None:
                self._made_client = make_client(self._settings)
        return self._made_client

    def _at(self, key: ArtifactKey) -> dict[str, Any]:
        return {"Bucket": self._settings.bucket, "Key": self._prefix + key}

    def _key_of(self, listed: Mapping[str, Any]) -> ArtifactKey:
        return ArtifactKey(listed["Key"].removeprefix(self._prefix))

    def _probe(self, num_bytes: int) -> None:
        at = self._at(new_key("uploads"))
        with storage_errors("probe"):
            self._client.put_object(**at, Body=bytes(min(num_bytes, PROBE_BYTES)))
            self._client.get_object(**at)["Body"].read()
            self._client.delete_object(**at)

    def _put(
        self, key: ArtifactKey, chunks: Chunks, *, stop: threading.Event, media_type: str, file_name: str
    ) -> StoredFile:
        """Upload a file. The chunks are read twice: for the size and SHA-256, and for the upload.

        Raises StorageError, StoppedError.
        """
        num_bytes, sha256 = _measure(until_stopped(chunks(), stop))
        file = StoredFile(key, media_type, file_name, num_bytes, sha256)
        options = {
            "ContentType": media_type,
            "ContentDisposition": content_disposition(file_name),
            "Metadata": {"sha256": sha256},
        }
        with storage_errors("put"):
            try:
                self._client.upload_fileobj(
                    io.BufferedReader(_Reader(until_stopped(chunks(), stop), sha256=sha256)),
                    *self._at(key).values(),
                    ExtraArgs=options,
                    Callback=lambda _: failpoint("mid_upload"),
                    Config=self._transfer_config(),
                )
            except s3_errors() as error:
                # The file may be stored despite the error. If the response to the call that completes a multipart
                # upload is lost, boto3 repeats the call. The repeated call fails: the upload id no longer exists.
                # A service that does not answer is not asked, because the caller has waited long enough.
                if is_timeout(error) or not self._is_stored(file):
                    raise
        return file

    def _transfer_config(self) -> Any:
        """Return settings that upload the parts of a large file one by one, on the caller's thread.

        boto3's own threads are not needed, because the callers run in parallel.
        """
        from boto3.s3.transfer import TransferConfig

        return TransferConfig(
            multipart_threshold=_MULTIPART_ABOVE_BYTES + 1,
            multipart_chunksize=_PART_BYTES,
            use_threads=False,
            preferred_transfer_client="classic",
        )

    def _put_if_missing(self, at: dict[str, Any], body: bytes) -> None:
        try:
            self._client.put_object(**at, Body=body, IfNoneMatch="*")
        except s3_errors() as error:
            if status_of(error) == _NOT_IMPLEMENTED:  # the service has no conditional writes
                self._client.put_object(**at, Body=body)
            elif status_of(error) not in _LOST_RACE:
                raise

    def _is_stored(self, file: StoredFile) -> bool:
        try:
            found = self._client.head_object(**self._at(file.key))
        except s3_errors():
            return False
        return (found.get("ContentLength"), found["Metadata"].get("sha256")) == (file.num_bytes, file.sha256)

    def _abort(self, key: ArtifactKey, upload_id: str) -> None:
        try:
            self._client.abort_multipart_upload(**self._at(key), UploadId=upload_id)
        except self._client.exceptions.NoSuchUpload:
            return

    def _delete(self, key: ArtifactKey) -> None:
        with storage_errors("delete"):
            self._client.delete_object(**self._at(key))

    def _read(self, key: ArtifactKey, start: int = 0) -> Generator[bytes]:
        """If the connection breaks, open another one and continue from the same byte."""
        num_read = num_breaks = 0
        with storage_errors("read"):
            while (body := self._open(key, start + num_read)) is not None:
                with closing(body):
                    try:
                        for chunk in body.iter_chunks(READ_BYTES):
                            num_read += len(chunk)
                            num_breaks = 0
                            yield chunk
                        return
                    except s3_errors():
                        num_breaks += 1
                        if num_breaks > _MAX_BREAKS:
                            raise
        if num_read:
            raise StorageError("the stored file was deleted during the download")
        raise FileNotFoundError(key)

    def _open(self, key: ArtifactKey, start: int = 0) -> Any:
        """Return the body of an object from byte `start` on, or None when the object does not exist.

        Raises StorageError if the service sends other bytes, because it ignores the header Range.
        """
        options = {"Range": f"bytes={start}-"} if start else {}
        try:
            found = self._client.get_object(**self._at(key), **options)
        except s3_errors() as error:
            if is_missing(error):
                return None
            raise
        if start and not found.get("ContentRange", "").startswith(f"bytes {start}-"):
            found["Body"].close()
            raise StorageError("the object storage ignores the header Range")
        return found["Body"]


class _Reader(io.RawIOBase):
    """A file object that reads `chunks` once. Raises StorageError at the end if the data's SHA-256 is not `sha256`."""

    def __init__(self, chunks: Iterable[bytes], *, sha256: str) -> None:
        self._chunks = iter(chunks)
        self._digest = hashlib.sha256()
        self._sha256 = sha256
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Read the next bytes into `buffer`. Raises StorageError, StoppedError."""
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                if self._digest.hexdigest() != self._sha256:
                    raise StorageError("a file changed during the upload")
                return 0
            self._digest.update(chunk)
            self._rest = memoryview(chunk)
        num_bytes = min(len(buffer), len(self._rest))
        buffer[:num_bytes], self._rest = self._rest[:num_bytes], self._rest[num_bytes:]
        return num_bytes


def _measure(chunks: Iterable[bytes]) -> tuple[int, str]:
    """Return the size in bytes and the SHA-256 of a file."""
    digest = hashlib.sha256()
    num_bytes = 0
    for chunk in chunks:
        digest.update(chunk)
        num_bytes += len(chunk)
    return num_bytes, digest.hexdigest()
