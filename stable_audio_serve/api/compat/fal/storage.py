"""fal's storage for clients in Python and JavaScript: they upload files, and download them from links without a key.

A client sends a file at once, or first announces it and then sends it to a URL that needs no key. The URL contains a
signed ticket, so any replica of the HTTP server can receive the file, also one that did not handle the announcement.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from hashlib import file_digest, sha256
from typing import Annotated

from anyio import CancelScope
from fastapi import APIRouter, Depends, Header
from itsdangerous import BadData, URLSafeTimedSerializer
from pydantic import BaseModel, Field
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from stable_audio_serve.api.answers import audio_type
from stable_audio_serve.api.compat.fal.errors import render_error
from stable_audio_serve.api.compat.fal.wire import errors
from stable_audio_serve.api.links import base_url, published_url
from stable_audio_serve.api.middleware.api_keys import sent_key
from stable_audio_serve.api.middleware.callers import Caller
from stable_audio_serve.api.middleware.key_ring import KeyRing
from stable_audio_serve.api.middleware.limits import connection_of
from stable_audio_serve.api.routing import public_route_class, register_pattern, route_class
from stable_audio_serve.api.service import Service
from stable_audio_serve.core.errors import ConflictError, KeysUnavailableError, StorageError
from stable_audio_serve.core.private_files import needing_room, read_chunks
from stable_audio_serve.jobs.queue import JobQueue

_TICKET_LIFE = timedelta(days=1)
_KEY_DIGITS = 16
_RETRY_S = 5.0
_CHUNK_BYTES = 1_048_576
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")
_NO_STEM = re.compile(r"^[._-]*\.(?=[A-Za-z0-9]+$)")  # before the extension, if no letter of the name's stem is left
_TOKEN_LIFE = timedelta(hours=1)
_RAW_BODY = {
    "requestBody": {
        "required": False,  # a file may be empty
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}
_RESPONSES = errors(408, 413, 422, 500, 503, 507)
_KEY_RESPONSES = _RESPONSES | errors(401)
_UPLOAD_RESPONSES = _RESPONSES | errors(
    own={
        400: "A different file exists already.",
        403: "The upload URL is invalid or expired, or its key was removed.",
        404: "Unknown URL.",
    }
)


# A signed ticket, and no other path below `/storage/upload`. A compressed payload begins with a dot. The first part can
# end only at the next dot, so the match takes linear time.
register_pattern("fal_ticket", r"[^/][^/.]*\.[^/]+")

_Name = Annotated[str | None, Header(alias="x-fal-file-name")]
_Type = Annotated[str | None, Header(alias="content-type", include_in_schema=False)]


class UploadToken(BaseModel):
    """Token for uploads: the client's own API key, which is valid for these routes too."""

    token: str
    token_type: str
    base_url: str
    expires_at: datetime


class NewUpload(BaseModel):
    """A file to be uploaded."""

    file_name: str | None = Field(None, description="Name of the file; unset = upload.bin.")
    content_type: str | None = Field(None, description="An audio type; any other type = application/octet-stream.")


class UploadPlace(BaseModel):
    """The URL to upload the file to, and the URL of the file after the upload."""

    upload_url: str
    file_url: str


class Uploaded(BaseModel):
    """URL of the file."""

    access_url: str


@dataclass(frozen=True, slots=True)
class Ticket:
    """An announced upload: the properties of the file, and the client that announced the upload."""

    file_id: str
    file_name: str
    media_type: str
    client: str = ""  # the client whose storage limit the file counts against
    key: str = ""  # first digits of the SHA-256 of the API key of the announcement; "" without configured keys

    def url(self, base: str) -> str:
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
        safe = _NO_STEM.sub("upload.", _UNSAFE.sub("_", file_name or "")[-100:])
        name = safe.lstrip("._-") or "upload.bin"
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
        with suppress(BadData):
            # Without `max_age`, which would refuse tickets of a server whose clock is ahead.
            fields, signed_at = (await self._serializer()).loads(ticket, return_timestamp=True)
            found = Ticket(**fields)
            if datetime.now(UTC) - signed_at < _TICKET_LIFE and self._has_key(found):
                return found
        raise HTTPException(403, "upload: the URL is invalid or expired; initiate the upload again")

    def _has_key(self, ticket: Ticket) -> bool:
        if self._ring.health.state == "unread":
            raise KeysUnavailableError("the key file cannot be read; retry later", retry_after_s=_RETRY_S)
        is_known = bool(ticket.key) and any(digest.startswith(ticket.key) for digest in self._ring.keys)
        return is_known or (self._ring.is_open and not ticket.key)

    async def _serializer(self) -> URLSafeTimedSerializer:
        if self._known is None:
            secret = await asyncio.to_thread(self._jobs.store.secret)
            self._known = URLSafeTimedSerializer(secret, salt="fal-upload", signer_kwargs={"digest_method": sha256})
        return self._known


def build_storage_routers(service: Service) -> tuple[APIRouter, APIRouter]:
    """Return a router for the routes that need an API key, and a router for uploads to URLs with a signed ticket."""
    limits, jobs, tickets = service.settings.api, service.jobs, Tickets(service.jobs, service.keys.ring)
    private = route_class(render_error, scopes=("generate", "jobs"))
    announcing = APIRouter(route_class=private, strict_content_type=False)
    receiving = APIRouter(route_class=public_route_class(render_error), strict_content_type=False)

    @announcing.post("/storage/auth/token", responses=_KEY_RESPONSES)
    async def make_token(request: Request) -> UploadToken:
        """Return a token for uploads."""
        scheme, key = sent_key(request)
        return UploadToken(
            token=key or "none",
            token_type=scheme or "Bearer",
            base_url=base_url(request, limits),
            expires_at=datetime.fromtimestamp(service.clock.time(), UTC) + _TOKEN_LIFE,
        )

    @announcing.post("/storage/upload/initiate", responses=_KEY_RESPONSES)
    async def announce(request: Request, body: NewUpload) -> UploadPlace:
        """Announce a file. Its bytes are PUT to `upload_url`."""
        ticket = tickets.announce(body.file_name, body.content_type, caller=request.state.caller)
        base, signed = base_url(request, limits), await tickets.sign(ticket)
        return UploadPlace(upload_url=f"{base}/storage/upload/{signed}", file_url=ticket.url(base))

    @announcing.post("/files/upload", openapi_extra=_RAW_BODY, responses={**_UPLOAD_RESPONSES, **_KEY_RESPONSES})
    async def upload(request: Request, name: _Name = None, *, media_type: _Type = None) -> Uploaded:
        """Store a file. The body is its content."""
        ticket = tickets.announce(name, media_type, caller=request.state.caller)
        await _store(jobs, request, ticket=ticket)
        return Uploaded(access_url=ticket.url(base_url(request, limits)))

    @receiving.put("/storage/upload/{ticket:fal_ticket}", openapi_extra=_RAW_BODY, responses=_UPLOAD_RESPONSES)
    async def receive(request: Request, announced: Ticket = Depends(tickets.read)) -> Uploaded:
        """Store an announced file. The body is its content."""
        await _store(jobs, request, ticket=announced)
        return Uploaded(access_url=announced.url(base_url(request, limits)))

    return announcing, receiving


async def _store(jobs: JobQueue, request: Request, *, ticket: Ticket) -> None:
    """Store the request's body as the file that the ticket announces, and count it against the client's limit.

    Raises HTTPException 400 if a different file was already stored for this ticket. Raises UploadQuotaError and
    StorageError.
    """
    connection_of(request.scope).accept_file_body()
    with tempfile.SpooledTemporaryFile(max_size=_CHUNK_BYTES) as file:
        body, num_bytes = UploadFile(file), 0  # type: ignore[arg-type]
        async for chunk in request.stream():
            with needing_room():
                await body.write(chunk)
            num_bytes += len(chunk)
        await body.seek(0)
        if await _is_stored(jobs, file, ticket=ticket):
            return
        # Uploads to the same URL at once are counted separately. Only one of them is stored.
        uploads, name = jobs.store.uploads, secrets.token_hex(16)
        chunks = partial(read_chunks, file)
        try:
            await jobs.write(partial(uploads.add, name, client=ticket.client, num_bytes=num_bytes))
            await jobs.publish(chunks, media_type=ticket.media_type, file_name=ticket.file_name, file_id=ticket.file_id)
        except (asyncio.CancelledError, ConflictError, StorageError) as error:
            # A file that was not stored does not count. After a StorageError, or if the client disconnected, it may be
            # stored all the same.
            with CancelScope(shield=True):
                if isinstance(error, ConflictError) or await jobs.find_file(ticket.file_id) is None:
                    await jobs.write(partial(uploads.forget, name))
            if not (isinstance(error, ConflictError) and await _is_stored(jobs, file, ticket=ticket)):
                raise


async def _is_stored(jobs: JobQueue, file: tempfile.SpooledTemporaryFile[bytes], *, ticket: Ticket) -> bool:
    """Whether this file was stored for the ticket before: the client lost the response and sends the file again.

    Raises HTTPException 400 if a different file was stored.
    """
    if (existing := await jobs.find_file(ticket.file_id)) is None:
        return False
    file.seek(0)
    if (await asyncio.to_thread(file_digest, file, "sha256")).hexdigest() != existing.sha256:
        raise HTTPException(400, "upload: a different file was uploaded to this URL already")
    return True
