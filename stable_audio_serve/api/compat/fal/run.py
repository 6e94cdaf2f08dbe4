"""fal's synchronous calls: the response to the submission contains the link to the audio."""

from __future__ import annotations

from starlette.requests import Request

from stable_audio_serve.api.compat.fal.wire import AudioOutput, File
from stable_audio_serve.api.links import base_url, published_url
from stable_audio_serve.api.middleware.observe import note
from stable_audio_serve.api.service import Service
from stable_audio_serve.artifacts.store import StoredFile
from stable_audio_serve.audio.finish import FileOrder
from stable_audio_serve.core.catalog import ModelCard
from stable_audio_serve.core.generation import GenerationRequest

FILE_STEM = "stable-audio"


async def run(
    request: Request, service: Service, *, card: ModelCard, generation: GenerationRequest, order: FileOrder
) -> AudioOutput:
    """Generate audio, store the file and return its URL. Raises errors of `core.errors`."""
    started_at = service.clock.monotonic()
    result = await service.generate(card, generation, caller=request.state.caller, started_at=started_at)
    output = await service.finish(result, order)
    note(request.scope, num_bytes=output.file.num_bytes)
    file_id, file = await service.jobs.publish(
        output.file.chunks,
        media_type=output.file.media_type,
        file_name=f"{FILE_STEM}.wav",
        clips=output.clips,
        made_on=result.made_on,
    )
    base = base_url(request, service.settings.api)
    return describe_output(file, published_url(base, file_id, file_name=file.file_name))


def describe_output(file: StoredFile, url: str) -> AudioOutput:
    """Return the output of the model, as synchronous calls, results and webhooks contain it."""
    return AudioOutput(
        audio_file=File(url=url, content_type=file.media_type, file_name=file.file_name, file_size=file.num_bytes)
    )
