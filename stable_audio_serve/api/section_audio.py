"""The audio of a long piece while it is made: one finished section, or a stream that grows with the piece."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, contextmanager
from functools import partial
from typing import TYPE_CHECKING, BinaryIO

from anyio import CancelScope
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from stable_audio_serve.api.answers import attachment, chain, sound_headers
from stable_audio_serve.api.middleware.callers import Caller
from stable_audio_serve.api.service import Service
from stable_audio_serve.audio.formats import media_type
from stable_audio_serve.audio.writer import AudioWriter, StreamFile
from stable_audio_serve.core.catalog import ModelCard
from stable_audio_serve.core.private_files import open_temporary, read_chunks
from stable_audio_serve.core.sound import PLAIN_WAV, AudioFormat, Encoding
from stable_audio_serve.jobs.job import FinishedSection, Job, JobSpec
from stable_audio_serve.jobs.pieces.sections import LostSectionError, num_final_samples, plan_sections, read_section

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

# Formats of files that can be sent before their end is known.
_GROWING = (AudioFormat.MP3, AudioFormat.WAV, AudioFormat.PCM, AudioFormat.ULAW, AudioFormat.ALAW)
_MP3_KBPS = 192


async def section_answer(service: Service, request: Request, *, job: Job, number: int) -> Response:
    """Return one finished section, in the format of the job.

    In a lossless format at the model's sample rate, the joined responses for all sections are the whole piece. The last
    30 ms of a section change when the next section is joined to it, so the response for the next section begins with
    them. It counts as an open stream. Raises HTTPException 404 while the section is not finished, or if its file no
    longer exists, StorageError, and the errors of `EventStreams.open`.
    """
    _require_sections(job)
    num_sections = len(job.spec.sections)
    if number > num_sections:
        raise HTTPException(404, f"section: the job has {num_sections} sections, 1 to {num_sections}")
    found = await service.jobs.sections(job.spec.ref, after=number - 1)
    if not found or found[0].number != number:
        raise HTTPException(404, f"section {number} is not finished: the job is {job.state}, {job.num_sections} are")
    section, encoding, streams = found[0], job.spec.encoding, service.streams
    stop = num_final_samples(section, is_last=number == num_sections)
    with streams.counted(request.state.caller):
        # `_send` closes the file. It is not closed after an error: if the client has gone, the writer may still use it.
        copy = open_temporary()
        writer = AudioWriter(copy, section.sample_rate_hz, encoding=encoding)
        with _missing_files(job):
            async with aclosing(read_section(service.jobs.artifacts.read, section, stop=stop)) as blocks:
                async for block in blocks:
                    await service.compute_in_turn(partial(writer.write, block))
        await service.compute_in_turn(writer.close)
    kind = media_type(encoding.file_format)
    name = f"{job.spec.file_prefix}{job.spec.file_stem}-{number}.{encoding.file_format}"
    headers = {
        **attachment(name),
        **sound_headers(section.file.clips, section.file.made_on),
        "Content-Length": str(copy.seek(0, 2)),
    }
    if request.method == "HEAD":
        copy.close()
        return Response(headers=headers, media_type=kind)
    return streams.open_audio(_send(copy), caller=request.state.caller, headers=headers, media_type=kind)


async def follow_answer(service: Service, request: Request, *, job: Job) -> Response:
    """Return a stream of the piece: the finished sections first, then each further section when it is finished.

    The stream is an MP3 file if the job's format is MP3, otherwise a WAV file of unknown length. Raises OverloadedError
    or QuotaError if too many streams are open, HTTPException 409 if the job ended before a section was finished, 404 if
    it ended and the file of the first section no longer exists, and StorageError if the first section cannot be read.
    """
    _require_sections(job)
    if job.is_over and not job.num_sections:
        raise HTTPException(409, f"the job has no audio: it is {job.state}")
    is_mp3 = job.spec.encoding.file_format is AudioFormat.MP3
    # A constant bit rate, because players estimate the length from it.
    encoding = Encoding(AudioFormat.MP3, job.spec.encoding.bitrate_kbps or _MP3_KBPS) if is_mp3 else PLAIN_WAV
    kind = media_type(encoding.file_format)
    headers = attachment(f"{job.spec.file_prefix}{job.spec.file_stem}.{encoding.file_format}")
    if request.method == "HEAD":
        return StreamingResponse(iter(()), headers=headers, media_type=kind)  # without a length, which is unknown
    chunks, first = _follow(service, job, encoding=encoding), b""
    if job.num_sections:  # read some audio before the status is sent, so that an error gets its own status
        with service.streams.counted(request.state.caller), _missing_files(job):
            first = await anext(chunks, b"")
    return service.streams.open_audio(
        chain(first, chunks),
        caller=request.state.caller,
        headers=headers,
        media_type=kind,
    )


async def piece_answer(
    service: Service, request: Request, *, spec: JobSpec, card: ModelCard, is_stream: bool
) -> StreamingResponse:
    """Run the job of a long piece, and return its file. With `is_stream`, the response has no Content-Length.

    A stream begins when the first section is finished, or when all are, if files of this format cannot be sent before
    their end is known. If the client leaves, the job is cancelled. Raises the errors of `Service.run_job`.
    """
    caller = request.state.caller
    if is_stream and spec.encoding.file_format in _GROWING:
        chunks = _make_piece(service, spec, card=card, caller=caller)
        first, headers = await anext(chunks), {"X-Seed": str(spec.request.seed)}
        kind = media_type(spec.encoding.file_format)
        return StreamingResponse(chain(first, chunks), headers=headers, media_type=kind)
    file = await service.run_job(spec, card=card, caller=caller)
    headers = sound_headers(file.clips, file.made_on)
    headers |= {} if is_stream else {"Content-Length": str(file.num_bytes)}
    chunks = service.jobs.artifacts.read(file)
    first = await anext(chunks, b"")  # before the status is sent, so that an error gets its own status
    return StreamingResponse(chain(first, chunks), headers=headers, media_type=file.media_type)


async def _make_piece(service: Service, spec: JobSpec, *, card: ModelCard, caller: Caller) -> AsyncGenerator[bytes]:
    """Add the job of a long piece, and yield the bytes of its file while it is made.

    If the iterator is closed early, the job is cancelled. Raises the errors of `Service.run_job`.
    """
    async with service.own_job(spec, card=card, caller=caller) as job:
        try:
            num_samples = plan_sections(spec, card)[-1].stop
            async with aclosing(
                _follow(service, job, encoding=spec.encoding, num_samples=num_samples, finishes=True)
            ) as chunks:
                async for chunk in chunks:
                    yield chunk
            service.require_file(await service.jobs.get(spec.ref) or job)
        finally:
            with CancelScope(shield=True):  # the response's scope is cancelled when the client has left
                await service.jobs.cancel(spec.ref)


def _require_sections(job: Job) -> None:
    if not job.spec.sections:
        raise HTTPException(409, "the job has no sections: only long pieces have")


@contextmanager
def _missing_files(job: Job) -> Iterator[None]:
    """Raise HTTPException 404 if the file of a section no longer exists, unless an attempt will make it again."""
    try:
        yield
    except LostSectionError as error:
        if job.is_over and isinstance(error.__cause__, FileNotFoundError):
            raise HTTPException(404, "the file no longer exists") from error
        raise


async def _follow(
    service: Service, job: Job, *, encoding: Encoding, num_samples: int | None = None, finishes: bool = False
) -> AsyncGenerator[bytes]:
    """Yield the bytes of a piece's file while it is made. `num_samples` is its length in the header, if it has one.
    `finishes` is as in `EventStreams.follow`.

    The last 30 ms of each section are sent with the next section, because the join changes them.
    """
    read, last = service.jobs.artifacts.read, len(job.spec.sections)
    file = StreamFile()
    writer: AudioWriter | None = None
    newest: FinishedSection | None = None
    async with aclosing(service.streams.follow_sections(service.jobs, job, finishes=finishes)) as sections:
        async for section in sections:
            newest = section
            writer = writer or AudioWriter(
                file, section.sample_rate_hz, encoding=encoding, is_growing=True, num_samples=num_samples
            )
            stop = num_final_samples(section, is_last=section.number == last)
            async for data in _encoded(service, read_section(read, section, stop=stop), writer=writer, file=file):
                yield data
    if newest is None or writer is None:
        return
    if newest.number < last:  # the job failed or was cancelled
        end = read_section(read, newest, start=num_final_samples(newest, is_last=False), stop=newest.num_samples)
        async for data in _encoded(service, end, writer=writer, file=file):
            yield data
    await service.compute_in_turn(writer.close)
    yield file.take()


async def _encoded(
    service: Service, blocks: AsyncGenerator[npt.NDArray[np.float32]], *, writer: AudioWriter, file: StreamFile
) -> AsyncGenerator[bytes]:
    """Yield what `writer` writes to `file` for these blocks."""
    async with aclosing(blocks):
        async for block in blocks:
            await service.compute_in_turn(partial(writer.write, block))
            if data := file.take():
                yield data


async def _send(file: BinaryIO) -> AsyncIterator[bytes]:
    with file:
        for chunk in read_chunks(file):
            yield chunk
