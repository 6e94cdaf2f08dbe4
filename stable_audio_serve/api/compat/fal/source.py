"""The source audio of a request: a file of this server's storage, a data URI, or a file on a public host."""

from __future__ import annotations

import asyncio
import re
from base64 import b64decode
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import IO
from urllib.parse import unquote_to_bytes

from starlette.datastructures import UploadFile
from starlette.requests import Request

from stable_audio_serve.api.links import base_url
from stable_audio_serve.api.middleware.limits import connection_of
from stable_audio_serve.api.service import Service
from stable_audio_serve.core.errors import InvalidRequestError
from stable_audio_serve.core.private_files import needing_room, temporary_file
from stable_audio_serve.jobs.webhooks.delivery import DeliveryError, download

FIELD = "audio_url"
_STANDARD_BASE64 = bytes.maketrans(b"-_", b"+/")


@asynccontextmanager
async def opened_source(url: str, service: Service, *, request: Request) -> AsyncIterator[UploadFile]:
    """Yield the file at `url`, at most `api.max_upload_bytes` long, which counts like the body of `request`.

    Raises InvalidRequestError, and HTTPException 503 if too many bytes are being received.
    """
    max_bytes, base = service.settings.api.max_upload_bytes, base_url(request, service.settings.api)
    count = connection_of(request.scope).count_fetched
    with temporary_file() as file:
        if url[:5].lower() == "data:":
            content = await asyncio.to_thread(_decode, url)
            with needing_room():
                file.write(content)
        elif (file_id := _own_file(url, base=base)) is not None:
            await _copy_own(service, file_id, into=file, max_bytes=max_bytes, count=count)
        else:
            try:
                hosts = service.settings.jobs.webhook_allow_hosts
                client = request.state.caller.name
                await download(url, file, max_bytes=max_bytes, client=client, allow_hosts=hosts, count=count)
            except DeliveryError as error:
                raise _unusable(str(error)) from error
        num_bytes = file.tell()
        _check_size(num_bytes, max_bytes)
        file.seek(0)
        yield UploadFile(file, size=num_bytes)


def _decode(url: str) -> bytes:
    """Return the content of a data URI (RFC 2397). Its base64 may be URL-safe and may lack the padding."""
    head, comma, text = url.partition(",")
    try:
        if not comma:
            raise ValueError("no comma")
        content = unquote_to_bytes(text)
        if not head.lower().endswith(";base64"):
            return content
        digits = content.translate(_STANDARD_BASE64, b"\t\r\n").rstrip(b"=")
        return b64decode(digits + b"=" * (-len(digits) % 4), validate=True)
    except ValueError as error:
        raise _unusable("is not a valid data URI") from error


def _own_file(url: str, *, base: str) -> str | None:
    """Return the id of a file in this server's storage, None for other URLs."""
    own = re.escape(base.partition("://")[2])
    found = re.fullmatch(rf"https?://{own}/files/([0-9a-f]{{32}})/[^/]+", url)
    return found[1] if found else None


async def _copy_own(
    service: Service, file_id: str, *, into: IO[bytes], max_bytes: int, count: Callable[[int], None]
) -> None:
    file = await service.jobs.find_file(file_id)
    try:
        if file is None:
            raise FileNotFoundError
        _check_size(file.num_bytes, max_bytes)
        count(file.num_bytes)
        async for chunk in service.jobs.artifacts.read(file):
            with needing_room():
                into.write(chunk)
    except FileNotFoundError as error:
        raise _unusable("is a file of this server that does not exist (any more)") from error


def _check_size(num_bytes: int, max_bytes: int) -> None:
    if num_bytes > max_bytes:
        raise _unusable(f"is larger than {max_bytes} bytes (api.max_upload_bytes)")


def _unusable(reason: str) -> InvalidRequestError:
    allowed = "an http or https URL on a public address, a file of this server, or a data URI"
    return InvalidRequestError(f"{FIELD} {reason}; allowed: {allowed}", field=FIELD, allowed=allowed)
