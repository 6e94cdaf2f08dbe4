"""fal's synchronous calls, and the output that they, the results of queued requests and webhooks have."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request

from stable_audio_serve.api.compat.fal.endpoints import SA3_APP, SA25_APP
from stable_audio_serve.api.compat.fal.wire import AudioOutput, File, Output, PromptedOutput, SeededOutput
from stable_audio_serve.api.links import base_url, published_url
from stable_audio_serve.api.middleware.observe import note
from stable_audio_serve.api.service import Service
from stable_audio_serve.audio.finish import FileOrder
from stable_audio_serve.core.catalog import ModelCard
from stable_audio_serve.core.generation import GenerationRequest

FILE_STEM = "stable-audio"


async def run(
    request: Request,
    service: Service,
    *,
    card: ModelCard,
    generation: GenerationRequest,
    order: FileOrder,
    wire: Mapping[str, Any],
) -> Output:
    """Generate audio, store the file and return the output. Raises errors of `core.errors`.

    `wire` has the application, and whether the file is returned as a data URI. Then it is not stored.
    """
    started_at = service.clock.monotonic()
    result = await service.generate(card, generation, caller=request.state.caller, started_at=started_at)
    output = await service.finish(result, order)
    note(request.scope, num_bytes=output.file.num_bytes)
    name, media_type = f"{FILE_STEM}.{order.encoding.file_format}", output.file.media_type
    if wire.get("sync_mode"):
        url = data_uri(output.file.to_bytes(), media_type)
    else:
        file_id, _ = await service.jobs.publish(
            output.file.chunks, media_type=media_type, file_name=name, clips=output.clips, made_on=result.made_on
        )
        url = published_url(base_url(request, service.settings.api), file_id, file_name=name)
    file = File(url=url, content_type=media_type, file_name=name, file_size=output.file.num_bytes)
    return describe_output(file, wire, seed=result.seeds[0], prompt=generation.prompt)


def describe_output(file: File, wire: Mapping[str, Any], *, seed: int, prompt: str) -> Output:
    """Return the output in the form of the application."""
    match wire.get("app"):
        case str(app) if app == SA3_APP:
            return PromptedOutput(audio=file, seed=seed, prompt=prompt)
        case str(app) if app == SA25_APP:
            return SeededOutput(audio=file, seed=seed)
    return AudioOutput(audio_file=file)


def data_uri(content: bytes, media_type: str) -> str:
    """Return a file as a data URI."""
    return f"data:{media_type};base64,{b64encode(content).decode()}"
