"""Submissions: what a client asks for besides the input, and the run or the queued job that a submission becomes."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from starlette.requests import Request

from stable_audio_serve.api.compat.fal.answers import data_uri, describe_output
from stable_audio_serve.api.compat.fal.targets import links_of
from stable_audio_serve.api.compat.fal.wire import Output, Ticket
from stable_audio_serve.api.compat.hosted import File
from stable_audio_serve.api.links import base_url, published_url
from stable_audio_serve.api.middleware.observe import note
from stable_audio_serve.api.service import Service
from stable_audio_serve.audio.finish import ClipOrigin, FileOrder
from stable_audio_serve.core.catalog import ModelCard
from stable_audio_serve.core.errors import StorageError
from stable_audio_serve.core.generation import GenerationRequest, Priority, Role
from stable_audio_serve.core.ids import JobId
from stable_audio_serve.core.sound import PLAIN_WAV, Encoding, Peaks
from stable_audio_serve.jobs.job import JobSpec, JobUpload, Mode

_FILE_STEM = "stable-audio"
_MODES: Mapping[Role | None, Mode] = {None: "text-to-audio", "init": "audio-to-audio", "inpaint": "inpainting"}


@dataclass(frozen=True, slots=True)
class Submission:
    """What path, headers and query of a submission ask for. Only queued ones use `priority` and `webhook_url`."""

    request_id: str
    is_queued: bool
    start_within_s: float | None
    priority: Priority = "interactive"
    webhook_url: str | None = None


@dataclass(frozen=True, slots=True)
class Order:
    """A converted input. `wire` has the application, and whether the file is returned as a data URI."""

    card: ModelCard
    generation: GenerationRequest
    encoding: Encoding = PLAIN_WAV
    peaks: Peaks | None = None
    upload: JobUpload | None = None
    wire: Mapping[str, Any] = field(default_factory=dict)


async def submit(request: Request, service: Service, *, order: Order, submission: Submission) -> Output | Ticket:
    """Run an order now, or queue it if the client means fal's queue. Raises errors of `core.errors`."""
    card, duration_s = order.card, order.generation.duration_s
    note(request.scope, model=card.name, duration_s=duration_s, fal_request_id=submission.request_id)
    if submission.is_queued:
        return await _queue(request, service, order=order, submission=submission)
    return await _run(request, service, order=order, start_within_s=submission.start_within_s)


async def _run(request: Request, service: Service, *, order: Order, start_within_s: float | None) -> Output:
    started_at = service.clock.monotonic()
    card, generation = service.adapted(order.card, replace(order.generation, start_within_s=start_within_s))
    result = await service.generate(card, generation, caller=request.state.caller, started_at=started_at)
    origin = ClipOrigin.of(generation) if service.settings.dialects.recipes else None
    peaks = order.peaks or service.settings.audio.peaks
    output = await service.finish(result, FileOrder(peaks, encoding=order.encoding, stem=_FILE_STEM, origin=origin))
    note(request.scope, num_bytes=output.file.num_bytes)
    name, media_type = f"{_FILE_STEM}.{order.encoding.file_format}", output.file.media_type
    if order.wire.get("sync_mode"):
        url = await service.compute(lambda: data_uri(output.file.to_bytes(), media_type))
    else:
        file_id, _ = await service.jobs.publish(
            output.file.chunks, media_type=media_type, file_name=name, clips=output.clips, made_on=result.made_on
        )
        url = published_url(base_url(request, service.settings.api), file_id, file_name=name)
    file = File(url=url, content_type=media_type, file_name=name, file_size=output.file.num_bytes)
    return describe_output(file, order.wire.get("app"), seed=result.seeds[0], prompt=generation.prompt)


async def _queue(request: Request, service: Service, *, order: Order, submission: Submission) -> Ticket:
    settings, request_id = service.settings, submission.request_id
    generation = replace(order.generation, init_audio=None, inpaint_audio=None, priority=submission.priority)
    spec = JobSpec(
        id=JobId(request_id),
        contract="fal",
        model=order.card.name,
        mode=_MODES[order.upload.role if order.upload else None],
        request=generation,
        encoding=order.encoding,
        file_stem=_FILE_STEM,
        peaks=order.peaks or settings.audio.peaks,
        with_recipe=settings.dialects.recipes,
        upload=order.upload,
        start_within_s=submission.start_within_s,
        webhook_url=submission.webhook_url,
        client=request.state.client,
        wire={"base_url": base_url(request, settings.api), **order.wire},
    )
    job = (await service.add_job(spec, card=order.card, caller=request.state.caller)).job
    links = links_of(request, request_id, limits=settings.api)
    position = 0
    with suppress(StorageError):  # an error would make the client submit the accepted job again
        position = await service.jobs.position(job)
    return Ticket(**links.model_dump(), gateway_request_id=request_id, queue_position=position)
