"""Parse request bodies of all content types that the dialect accepts into plain values."""

from __future__ import annotations

import json
from typing import Any

from starlette.datastructures import UploadFile
from starlette.requests import Request

from stable_audio_serve.core.errors import InvalidRequestError


async def read_json(request: Request) -> dict[str, Any]:
    """Return the JSON object in a body of any content type. Raises InvalidRequestError."""
    try:
        values = await request.json()
    except json.JSONDecodeError as error:
        raise InvalidRequestError("JSON body required") from error
    if not isinstance(values, dict):
        raise InvalidRequestError("JSON body required")
    return values


async def read_form(request: Request) -> dict[str, Any]:
    """Return the fields of a form, without empty file inputs. Raises HTTPException 400, 413."""
    form = await request.form()
    return {name: value for name, value in form.items() if not _is_no_file(name, value)}


async def read_json_or_form(request: Request) -> dict[str, Any]:
    """Return the fields of a form or JSON body. Raises the errors of `read_json` and `read_form`.

    JSON has no uploads, so its `audio_file` is ignored, as by the original server.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type.endswith(("/json", "+json")):
        return {name: value for name, value in (await read_json(request)).items() if name != "audio_file"}
    return await read_form(request)


def _is_no_file(name: str, value: object) -> bool:
    """Whether a file input is empty: browsers send a file without a name, and some libraries send an empty text."""
    if isinstance(value, UploadFile):
        return not value.filename and not value.size
    return name == "audio_file" and not value
