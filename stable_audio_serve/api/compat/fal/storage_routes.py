"""Routes of fal's storage, `/storage/...` and `/files/...`, for fal's clients in Python and JavaScript."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Path
from pydantic import BaseModel, ConfigDict, Field
from starlette.convertors import StringConvertor, register_url_convertor
from starlette.requests import Request
from starlette.responses import Response

from stable_audio_serve.api.compat.fal.errors import render_error
from stable_audio_serve.api.compat.fal.storage import MAX_PARTS, Storage, Ticket, Tickets
from stable_audio_serve.api.compat.fal.wire import INVALID, errors
from stable_audio_serve.api.links import base_url
from stable_audio_serve.api.routing import public_route_class, route_class
from stable_audio_serve.api.service import Service
from stable_audio_serve.core.settings import ApiSettings

_TOKEN_LIFE = timedelta(hours=1)
_RAW_BODY = {
    "requestBody": {
        "required": False,  # a file may be empty
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}
_RESPONSES = errors(408, 413, 500, 503, 507, own={422: INVALID})
_KEY_RESPONSES = _RESPONSES | errors(401)
_UPLOAD_RESPONSES = _RESPONSES | errors(
    own={
        400: "A different file exists already, or a part is missing.",
        403: "The upload URL is invalid or expired, or its key was removed.",
        404: "Unknown URL.",
    }
)


class TicketConvertor(StringConvertor):
    """`{name:fal_ticket}` in routes matches a signed ticket, and no other path below `/storage`."""

    regex = r"[^/]+\.[^/]+"


register_url_convertor("fal_ticket", TicketConvertor())

_Number = Annotated[int, Path(ge=1, le=MAX_PARTS)]
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


class MultipartUpload(BaseModel):
    """A multi-part upload. Parts are sent to `<access_url>/multipart/<uploadId>/<number>`."""

    access_url: str
    uploadId: str


class Part(BaseModel):
    """One uploaded part."""

    model_config = ConfigDict(extra="ignore")

    partNumber: int = Field(ge=1, le=MAX_PARTS)
    etag: str = Field(max_length=100)


class Parts(BaseModel):
    """All parts of a file."""

    parts: list[Part] = Field(min_length=1, max_length=MAX_PARTS)


def build_storage_routers(service: Service) -> tuple[APIRouter, APIRouter]:
    """Return the routes that need an API key, and those whose URLs contain the signed ticket of an announcement."""
    limits, tickets = service.settings.api, Tickets(service.jobs, service.keys.ring)
    storage = Storage(service.jobs, max_bytes=limits.max_upload_bytes)
    return _announcing_router(service, tickets, storage=storage), _receiving_router(limits, tickets, storage=storage)


def _announcing_router(service: Service, tickets: Tickets, *, storage: Storage) -> APIRouter:
    """Return the routes for tokens, announcements, and uploads in one request."""
    limits = service.settings.api
    router = APIRouter(route_class=route_class(render_error, scopes=("generate", "jobs")), strict_content_type=False)

    @router.post("/storage/auth/token", responses=_KEY_RESPONSES)
    async def make_token(request: Request) -> UploadToken:
        """Return a token for uploads."""
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        return UploadToken(
            token=key.strip() or "none",
            token_type=scheme or "Bearer",
            base_url=base_url(request, limits),
            expires_at=datetime.fromtimestamp(service.clock.time(), UTC) + _TOKEN_LIFE,
        )

    @router.post("/storage/upload/initiate", responses=_KEY_RESPONSES)
    @router.post("/storage/upload/initiate-multipart", summary="Announce Multi-Part", responses=_KEY_RESPONSES)
    async def announce(request: Request, body: NewUpload) -> UploadPlace:
        """Announce a file. Its bytes are PUT to `upload_url`, or in parts to `<upload_url>/<number>`."""
        ticket = tickets.announce(body.file_name, body.content_type, caller=request.state.caller)
        base, signed = base_url(request, limits), await tickets.sign(ticket)
        return UploadPlace(upload_url=f"{base}/storage/upload/{signed}", file_url=ticket.url(base))

    @router.post("/files/upload", openapi_extra=_RAW_BODY, responses={**_UPLOAD_RESPONSES, **_KEY_RESPONSES})
    async def upload(request: Request, name: _Name = None, *, media_type: _Type = None) -> Uploaded:
        """Store a file. The body is its content."""
        ticket = tickets.announce(name, media_type, caller=request.state.caller)
        await storage.receive(request, ticket)
        return Uploaded(access_url=ticket.url(base_url(request, limits)))

    @router.post("/files/upload/multipart", summary="Announce Multi-Part Upload", responses=_KEY_RESPONSES)
    async def announce_parts(request: Request, name: _Name = None, *, media_type: _Type = None) -> MultipartUpload:
        """Announce a multi-part upload."""
        ticket = tickets.announce(name, media_type, caller=request.state.caller)
        return MultipartUpload(access_url=ticket.url(base_url(request, limits)), uploadId=await tickets.sign(ticket))

    return router


def _receiving_router(limits: ApiSettings, tickets: Tickets, *, storage: Storage) -> APIRouter:
    router = APIRouter(route_class=public_route_class(render_error), strict_content_type=False)

    @router.put("/storage/upload/{ticket:fal_ticket}", openapi_extra=_RAW_BODY, responses=_UPLOAD_RESPONSES)
    async def receive(request: Request, announced: Ticket = Depends(tickets.read)) -> Uploaded:
        """Store an announced file. The body is its content."""
        await storage.receive(request, announced)
        return Uploaded(access_url=announced.url(base_url(request, limits)))

    forms = ("/storage/upload/{ticket:fal_ticket}", "/files/{file_id}/{file_name}/multipart/{ticket:fal_ticket}")
    for index, path in enumerate(forms):

        @router.put(
            f"{path}/{{number}}", openapi_extra=_RAW_BODY, responses=_UPLOAD_RESPONSES, include_in_schema=not index
        )
        async def receive_part(
            request: Request, response: Response, *, number: _Number, announced: Ticket = Depends(tickets.read)
        ) -> Part:
            """Store one part of an announced file."""
            etag = await storage.receive_part(request, announced, number=number)
            response.headers["ETag"] = f'"{etag}"'
            return Part(partNumber=number, etag=etag)

        @router.post(f"{path}/complete", responses=_UPLOAD_RESPONSES, include_in_schema=not index)
        async def complete(request: Request, body: Parts, *, announced: Ticket = Depends(tickets.read)) -> Uploaded:
            """Join the parts into the file."""
            await storage.join(announced, {part.partNumber: part.etag for part in body.parts})
            return Uploaded(access_url=announced.url(base_url(request, limits)))

    return router
