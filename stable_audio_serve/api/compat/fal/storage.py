"""fal's storage: clients upload files, whole or in parts, and download them from links that need no key.

A client first announces an upload, and then sends the file to a URL that needs no key. The URL contains a signed
ticket, so any replica of the HTTP server can receive the file, also one that did not handle the announcement.
"""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import tempfile
from collections.abc import AsyncIterator, Collection, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import file_digest, sha256
from typing import IO

from itsdangerous import BadData, URLSafeTimedSerializer
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from stable_audio_serve.api.answers import audio_type
from stable_audio_serve.api.links import published_url
from stable_audio_serve.api.middleware.callers import Caller
from stable_audio_serve.api.middleware.key_ring import KeyRing
from stable_audio_serve.api.middleware.limits import accept_file_body
from stable_audio_serve.artifacts.keys import part_key
from stable_audio_serve.artifacts.store import StoredFile
from stable_audio_serve.core.errors import DamagedFileError, KeysUnavailableError, StorageError, UploadTooLargeError
from stable_audio_serve.jobs.queue import JobQueue

MAX_PARTS = 10_000

_TICKET_LIFE_S = 86_400
_KEY_DIGITS = 16
_RETRY_S = 5.0
_CHUNK_BYTES = 1_048_576
_ETAG = re.compile(r'"?([0-9a-f]{64})-([0-9]{1,12})"?')
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass(frozen=True, slots=True)
class Ticket:
    """An announced upload: the properties of the file, and the client that announced the upload."""

    file_id: str
    file_name: str
    media_type: str
    client: str = ""  # the client whose storage limit the file counts against
    key: str = ""  # first digits of the SHA-256 of the API key of the announcement; "" without configured keys

    def url(self, base: str) -> str:
        """Return the URL of the file after the upload."""
        return published_url(base, self.file_id, file_name=self.file_name)


class Tickets:
    """Signs tickets for upload URLs, and verifies them.

    The secret is in the job database, which only processes of this installation can read. A ticket becomes invalid when
    the API key of the announcement is removed from the server's keys.
    """

    def __init__(self, jobs: JobQueue, ring: KeyRing) -> None:
        self._jobs = jobs
        self._ring = ring
        self._known: URLSafeTimedSerializer | None = None

    def announce(self, file_name: str | None, media_type: str | None, *, caller: Caller) -> Ticket:
        """Return a ticket for a new file. Its name and type are safe in paths and headers."""
        name = _UNSAFE.sub("_", file_name or "")[-100:].lstrip("._-") or "upload.bin"
        key = caller.key.digest[:_KEY_DIGITS]
        return Ticket(secrets.token_hex(16), name, audio_type(media_type), client=caller.name, key=key)

    async def sign(self, ticket: Ticket) -> str:
        """Return the signed ticket for a URL. Raises StorageError."""
        return str((await self._serializer()).dumps(asdict(ticket)))

    async def read(self, ticket: str) -> Ticket:
        """Verify the ticket in a URL and return it.

        Raises HTTPException 403 if the ticket is invalid or expired, or its API key was removed. Raises
        KeysUnavailableError while API keys cannot be checked. Raises StorageError.
        """
        try:
            found = Ticket(**(await self._serializer()).loads(ticket, max_age=_TICKET_LIFE_S))
        except BadData as error:
            raise _unknown_ticket() from error
        self._require_key(found)
        return found

    def _require_key(self, ticket: Ticket) -> None:
        if self._ring.health.state == "unread":
            raise KeysUnavailableError("the key file cannot be read; retry later", retry_after_s=_RETRY_S)
        is_known = bool(ticket.key) and any(digest.startswith(ticket.key) for digest in self._ring.keys)
        if not (is_known or (self._ring.is_open and not ticket.key)):
            raise _unknown_ticket()

    async def _serializer(self) -> URLSafeTimedSerializer:
        if self._known is None:
            secret = await asyncio.to_thread(self._jobs.store.secret)
            self._known = URLSafeTimedSerializer(secret, salt="fal-upload", signer_kwargs={"digest_method": sha256})
        return self._known


class Storage:
    """Receives the bytes of announced files, up to the size limit of uploads."""

    def __init__(self, jobs: JobQueue, *, max_bytes: int) -> None:
        self._jobs = jobs
        self._max_bytes = max_bytes

    async def receive(self, request: Request, ticket: Ticket) -> StoredFile:
        """Store the request's body as the whole file.

        Raises HTTPException 400 if a different body was already stored for this ticket.
        """
        async with _received(request) as body:
            existing = await self._jobs.find_file(ticket.file_id)
            if existing is not None:
                if (await asyncio.to_thread(file_digest, body, "sha256")).hexdigest() != existing.sha256:
                    raise HTTPException(400, "upload: a different file was uploaded to this URL already")
                return existing  # the client lost the response and sends the same file again
            async with self._counted(ticket, ticket.file_id, num_bytes=_size(body)):
                return await self._publish(ticket, body)

    async def receive_part(self, request: Request, ticket: Ticket, *, number: int) -> str:
        """Store the request's body as one part of the file. Returns the ETag of the part."""
        key = part_key(ticket.file_id, number)
        async with (
            _received(request) as body,
            self._counted(ticket, f"{ticket.file_id}-{number}", num_bytes=_size(body)),
        ):
            part = await self._jobs.artifacts.put(
                key, partial(_chunks, body), media_type=ticket.media_type, file_name=str(number)
            )
        return f"{part.sha256}-{part.num_bytes}"

    async def join(self, ticket: Ticket, etags: Mapping[int, str]) -> StoredFile:
        """Join the parts into one file, in order of their numbers. Raises HTTPException 400, UploadTooLargeError."""
        existing = await self._jobs.find_file(ticket.file_id)
        if existing is not None:
            return existing
        parts = [_find_part(ticket, number, etag=etags[number]) for number in sorted(etags)]
        if sum(part.num_bytes for part in parts) > self._max_bytes:
            limit = f"{self._max_bytes} bytes (api.max_upload_bytes)"
            raise UploadTooLargeError(f"parts: the upload is larger than {limit}")
        with tempfile.TemporaryFile() as joined:
            for part in parts:
                await self._append(joined, part)
            names = [f"{ticket.file_id}-{number}" for number in etags]
            async with self._counted(ticket, ticket.file_id, num_bytes=_size(joined), instead_of=names):
                file = await self._publish(ticket, joined)
        for part in parts:
            await self._jobs.artifacts.delete(part.key)
        return file

    @asynccontextmanager
    async def _counted(
        self, ticket: Ticket, name: str, *, num_bytes: int, instead_of: Collection[str] = ()
    ) -> AsyncIterator[None]:
        """Count a file against the client's storage limit, then run the block, which stores the file.

        The files `instead_of` no longer count. If the block raises StorageError, this file does not count either.
        Raises UploadQuotaError.
        """
        uploads = self._jobs.store.uploads
        add = partial(uploads.add, name, client=ticket.client, num_bytes=num_bytes, ticket=ticket.file_id)
        await asyncio.to_thread(partial(add, instead_of=instead_of))
        try:
            yield
        except StorageError:
            await asyncio.to_thread(uploads.forget, name)
            raise

    async def _append(self, joined: IO[bytes], part: StoredFile) -> None:
        try:
            async for chunk in self._jobs.artifacts.read(part):
                await asyncio.to_thread(joined.write, chunk)
        except FileNotFoundError as error:
            raise HTTPException(400, f"parts: part {part.file_name} was not uploaded") from error
        except DamagedFileError as error:
            raise _wrong_etag(part.file_name) from error

    async def _publish(self, ticket: Ticket, body: IO[bytes]) -> StoredFile:
        _, file = await self._jobs.publish(
            partial(_chunks, body), media_type=ticket.media_type, file_name=ticket.file_name, file_id=ticket.file_id
        )
        return file


def _find_part(ticket: Ticket, number: int, *, etag: str) -> StoredFile:
    """Return the stored part that an ETag names. Raises HTTPException 400 for a malformed ETag."""
    found = _ETAG.fullmatch(etag)
    if found is None:
        raise _wrong_etag(number)
    key = part_key(ticket.file_id, number)
    return StoredFile(key, ticket.media_type, str(number), num_bytes=int(found[2]), sha256=found[1])


def _unknown_ticket() -> HTTPException:
    return HTTPException(403, "upload: the URL is invalid or expired; initiate the upload again")


def _wrong_etag(number: int | str) -> HTTPException:
    return HTTPException(400, f"parts: the etag of part {number} differs from the one in the upload's response")


@asynccontextmanager
async def _received(request: Request) -> AsyncIterator[tempfile.SpooledTemporaryFile[bytes]]:
    """Receive a request's body into a temporary file, kept in memory while it is small."""
    accept_file_body(request.scope)
    with tempfile.SpooledTemporaryFile(max_size=_CHUNK_BYTES) as file:
        upload = UploadFile(file)  # type: ignore[arg-type]
        async for chunk in request.stream():
            await upload.write(chunk)
        await upload.seek(0)
        yield file


def _size(file: IO[bytes]) -> int:
    return file.seek(0, os.SEEK_END)


def _chunks(file: IO[bytes]) -> Iterator[bytes]:
    file.seek(0)
    while chunk := file.read(_CHUNK_BYTES):
        yield chunk
