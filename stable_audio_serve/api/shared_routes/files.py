"""Downloads of stored files. Links need no key, because their ids cannot be guessed. Files are streamed."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from stable_audio_serve.api.answers import PART_RESPONSES, file_answer
from stable_audio_serve.api.description import error_responses
from stable_audio_serve.api.native.errors import render_error
from stable_audio_serve.api.native.schemas import ErrorBody
from stable_audio_serve.api.routing import public_route_class
from stable_audio_serve.api.service import Service

TAG = "Files"


def build_router(service: Service) -> APIRouter:
    """Return the download route."""
    router = APIRouter(route_class=public_route_class(render_error), tags=[TAG])
    path = "/files/{file_id:hex_id}/{file_name}"

    @router.head(path, include_in_schema=False)
    @router.get(
        path,
        response_class=Response,
        responses={
            200: {"description": "The file.", "content": {"application/octet-stream": {}}},
            **PART_RESPONSES,
            **error_responses(ErrorBody, 416, 500, 503, own={404: "No such file, or it no longer exists."}),
        },
    )
    async def download(request: Request, file_id: str, *, file_name: str) -> Response:
        """Download a finished job's audio or a stored file. Anyone with the link may use it."""
        file = await service.jobs.find_file(file_id)
        if file is None or file.file_name != file_name:
            raise HTTPException(404, "file not found")
        return await file_answer(request, file, jobs=service.jobs)

    return router
