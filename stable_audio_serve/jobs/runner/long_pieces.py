"""Make a long piece: one section after the other, each stored before the next one begins, then the whole file.

A runner that takes over the job continues after the last stored section. The piece has the same bytes as without the
change of runners, because every section continues audio that was stored. Only a few blocks of the finished piece are in
memory at a time.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from stable_audio_serve.artifacts.keys import new_key
from stable_audio_serve.audio.encode import EncodedFile
from stable_audio_serve.audio.finish import text_of
from stable_audio_serve.audio.formats import file_rate, media_type
from stable_audio_serve.audio.loudness import ClipMeter
from stable_audio_serve.audio.peaks import treat_peaks
from stable_audio_serve.audio.section_files import encode_section
from stable_audio_serve.audio.section_joins import describe_section, join_section
from stable_audio_serve.audio.stream_level import LoudnessSearch, PieceFinisher
from stable_audio_serve.audio.workers import AudioWorkers
from stable_audio_serve.audio.writer import AudioWriter
from stable_audio_serve.core.backend import Backend
from stable_audio_serve.core.catalog import ModelCard
from stable_audio_serve.core.errors import (
    DeadlineExceededError,
    GenerationError,
    StartTimeoutError,
    StorageError,
    StorageFullError,
)
from stable_audio_serve.core.failpoints import failpoint
from stable_audio_serve.core.generation import GenerationRequest, GenerationResult, Progress, SourceAudio
from stable_audio_serve.core.private_files import read_chunks, temporary_file
from stable_audio_serve.core.sound import ClipFacts, Peaks
from stable_audio_serve.jobs.job import FinishedSection, Job, JobResult, JobSpec
from stable_audio_serve.jobs.pieces.recipes import common_maker, find_different, recipes_of
from stable_audio_serve.jobs.pieces.sections import (
    LostSectionError,
    SectionPlan,
    make_request,
    num_final_samples,
    plan_sections,
    read_end,
    read_section,
)
from stable_audio_serve.jobs.runner.files import JobFiles
from stable_audio_serve.jobs.runner.patient_calls import PatientCalls
from stable_audio_serve.jobs.store.job_store import JobStore
from stable_audio_serve.jobs.store.key_uses import Use
from stable_audio_serve.jobs.store.runner_jobs import GENERATED, Report

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

T = TypeVar("T")


class LeaseLostError(Exception):
    """The job's lease was lost, so this runner must not change the job any more."""


class LongPieces:
    """Makes the long pieces of one runner."""

    def __init__(
        self,
        backend: Backend,
        files: JobFiles,
        *,
        store: JobStore,
        audio: AudioWorkers,
        limited: Callable[[GenerationRequest, Job], GenerationRequest],
        calls: PatientCalls,
    ) -> None:
        """`limited` sets the time limits of a request."""
        self._backend = backend
        self._files = files
        self._store = store
        self._audio = audio
        self._limited = limited
        self._calls = calls

    async def make(self, job: Job, report: Callable[[Report], None]) -> JobResult:
        """Make the sections that are not finished yet, store the file of the piece, and return the result.

        Raises QuotaError if the limits of the client's key do not allow the next section yet. Raises LostSectionError
        if the file of a finished section is gone or damaged. The next attempt then makes this section and all later
        ones again. Also raises LeaseLostError, and the errors of `JobExecutor.execute`.
        """
        card = self._backend.catalog.find(job.spec.model)
        plans = plan_sections(job.spec, card)
        try:
            finished = await self._calls.call(self._store.sections.find, job.spec.ref)
            for plan in plans[len(finished) :]:
                async with self._charged(job, plan, rate_hz=card.sample_rate_hz):
                    request = await self._request(job, plan, card=card, finished=finished)
                    section = await self._make_section(
                        job, plans, plan=plan, finished=finished, request=request, report=report
                    )
                finished.append(section)
            report(Report(job, "storing", GENERATED))
            return await self._assemble(job, finished)
        except LostSectionError as error:
            kept = _fraction(plans, num_finished=error.number - 1)
            await self._calls.call(self._store.sections.remove, job, first=error.number, fraction=kept)
            raise

    @asynccontextmanager
    async def _charged(self, job: Job, plan: SectionPlan, *, rate_hz: int) -> AsyncIterator[None]:
        """Count a section's audio toward the limit of the client's key. Raises QuotaError if it exceeds the limit.

        If the block raises an error or is cancelled, the audio does not count, unless the section ran out of time or
        the client cancelled the job.
        """
        limits = job.spec.limits
        if limits.audio_seconds_per_minute is None:
            yield
            return
        audio_s = (plan.stop - plan.start) / rate_hz
        use = Use(id=secrets.token_hex(8), client=job.spec.client, limits=limits, audio_s=audio_s, has_place=False)
        if (refusal := await self._calls.call(self._store.key_uses.admit, use)) is not None:
            raise refusal
        try:
            yield
        except (Exception, asyncio.CancelledError) as error:
            with suppress(StorageError):  # then the audio counts, although it was not made
                if not await asyncio.to_thread(self._is_by_client, job, error):
                    await asyncio.to_thread(self._store.key_uses.end, use, counts=False)
            raise

    def _is_by_client(self, job: Job, error: BaseException) -> bool:
        """Whether `error` ended a section because of what the client asked for."""
        if isinstance(error, DeadlineExceededError):
            return not isinstance(error, StartTimeoutError)
        now = self._store.clients.get(job.spec.ref) if isinstance(error, asyncio.CancelledError) else None
        return now is not None and now.cancel_requested

    async def _request(
        self, job: Job, plan: SectionPlan, *, card: ModelCard, finished: Sequence[FinishedSection]
    ) -> GenerationRequest:
        before = None
        if plan.context:
            samples = await read_end(self._files.read, finished, num_samples=plan.context)
            before = SourceAudio(samples, card.sample_rate_hz)
        request = self._limited(make_request(job.spec, plan, card=card, before=before), job)
        # With the second section, the job has started already.
        return request if plan.number == 1 else replace(request, start_within_s=None)

    async def _make_section(
        self,
        job: Job,
        plans: Sequence[SectionPlan],
        *,
        plan: SectionPlan,
        finished: Sequence[FinishedSection],
        request: GenerationRequest,
        report: Callable[[Report], None],
    ) -> FinishedSection:
        """Generate a section, store its file, and add it to the job. Raises LeaseLostError."""

        def on_progress(progress: Progress) -> None:
            if progress.stage != "done":
                fraction = _fraction(plans, num_finished=plan.number - 1, next_fraction=progress.fraction)
                report(Report(job, progress.stage, fraction, engine_position=progress.queue_position))

        started_at = time.monotonic()
        result = await self._backend.generate(job.spec.model, request, on_progress=on_progress)
        inference_s = time.monotonic() - started_at
        finish = partial(
            _finish_section,
            result,
            before=request.inpaint_audio,
            plan=plan,
            like=_find_similar(plans, plan, finished=finished),
            peaks=job.spec.peaks,
        )
        file, num_samples, facts = await self._audio.run_encoding(finish)
        stored = await self._files.put(
            job,
            file.chunks,
            name=f"{job.spec.file_stem}-{plan.number}.wav",
            media_type=file.media_type,
            num_bytes=file.num_bytes,
            key=new_key("sections"),
        )
        failpoint("after_section")
        stored = replace(stored, clips=(facts,), made_on=result.made_on)
        section = FinishedSection(plan.number, stored, num_samples, result.sample_rate_hz, inference_s)
        fraction = _fraction(plans, num_finished=plan.number)
        if await self._calls.call(self._store.sections.add, job, section, fraction=fraction) is None:
            # The section may have been added although the database's answer was lost.
            added = await self._calls.call(self._store.sections.find, job.spec.ref, after=plan.number - 1)
            if all(one.file.key != stored.key for one in added):
                await self._files.discard(stored.key)
            raise LeaseLostError
        return section

    async def _assemble(self, job: Job, sections: Sequence[FinishedSection]) -> JobResult:
        """Write the whole piece to a temporary file, and store it."""
        spec, file_format = job.spec, job.spec.encoding.file_format
        made_on, different = common_maker(sections), find_different(sections)
        recipes = recipes_of(spec, seeds=spec.request.seeds, made_on=made_on, different=different)
        with temporary_file() as file:
            writer = AudioWriter(
                file,
                sections[0].sample_rate_hz,
                encoding=spec.encoding,
                text=text_of(recipes[0], file_format=file_format) if spec.with_recipe else None,
            )
            try:
                facts = await self._write(spec, sections, writer=writer)
            finally:
                await _to_end(self._audio.run_encoding(partial(_close, writer)))
            stored = await self._files.put(
                job,
                partial(read_chunks, file),
                name=f"{spec.file_stem}.{file_format}",
                media_type=media_type(file_format),
                num_bytes=file.seek(0, 2),
            )
        return JobResult(
            file=replace(stored, clips=(facts,), made_on=made_on),
            file_id=secrets.token_hex(16),
            sample_rate_hz=file_rate(spec.encoding, sections[0].sample_rate_hz),
            seeds=spec.request.seeds,
            inference_s=sum(section.inference_s for section in sections),
            different=different,
        )

    async def _write(self, spec: JobSpec, sections: Sequence[FinishedSection], *, writer: AudioWriter) -> ClipFacts:
        """Write the finished audio of a piece, and return its measurements. Raises StorageError."""
        rate_hz, finishing = sections[0].sample_rate_hz, spec.finishing
        search = None
        if finishing.loudness is not None:
            search = LoudnessSearch(rate_hz, loudness=finishing.loudness)
            while search.needs_pass:
                await self._each_block(sections, search.add)
                await _to_end(self._audio.run_encoding(search.end_pass))
        num_samples = sum(num_final_samples(each, is_last=each is sections[-1]) for each in sections)
        finisher = PieceFinisher(rate_hz, finishing=finishing, num_samples=num_samples, search=search)
        meter = ClipMeter(rate_hz)

        def write(block: npt.NDArray[np.float32]) -> None:
            if block.shape[1]:
                meter.add(block)
                writer.write(block)

        def end() -> ClipFacts:
            if (rest := finisher.end()) is not None:
                write(rest)
            writer.close()
            facts = meter.describe(seed=spec.request.seed)
            return facts if search is None else replace(facts, true_peak_dbtp=finisher.true_peak_dbtp)

        await self._each_block(sections, lambda block: write(finisher.add(block)))
        return await _to_end(self._audio.run_encoding(end))

    async def _each_block(
        self, sections: Sequence[FinishedSection], use: Callable[[npt.NDArray[np.float32]], None]
    ) -> None:
        """Call `use` on a thread with each block of a piece's audio, (C, S) float32, in order."""
        for section in sections:
            stop = num_final_samples(section, is_last=section is sections[-1])
            async with aclosing(read_section(self._files.read, section, stop=stop)) as blocks:
                async for block in blocks:
                    await _to_end(self._audio.run_encoding(partial(use, block)))


def _fraction(plans: Sequence[SectionPlan], *, num_finished: int, next_fraction: float = 0.0) -> float:
    """Return the job's progress when `num_finished` sections and `next_fraction` of the next one are generated."""
    sizes = [plan.num_generated for plan in plans]
    done = sum(sizes[:num_finished]) + sum(sizes[num_finished : num_finished + 1]) * next_fraction
    return GENERATED * done / sum(sizes)


def _close(writer: AudioWriter) -> None:
    """Close `writer`, even if an error has left the file incomplete."""
    with suppress(StorageFullError):  # the file is not used
        writer.close()


def _finish_section(
    result: GenerationResult,
    *,
    before: SourceAudio | None,
    plan: SectionPlan,
    like: ClipFacts | None,
    peaks: Peaks,
) -> tuple[EncodedFile, int, ClipFacts]:
    """Return a section's file, its number of samples and its measurements. Raises GenerationError."""
    rate_hz, audio = result.sample_rate_hz, result.audio[0]
    if audio.shape[1] != plan.num_generated:
        raise GenerationError(f"section {plan.number} has another length than expected")
    num_own = plan.stop - plan.start
    if before is None:
        own = treat_peaks(audio[:, :num_own], rate_hz, peaks=peaks)
    else:
        span = result.generated[0][-1] if result.generated else None
        own = join_section(
            audio,
            rate_hz,
            before=before.samples,
            num_own=num_own,
            span=span,
            like=like,
            peaks=peaks,
        )
    return encode_section(own, rate_hz), own.shape[1], describe_section(own, rate_hz, seed=plan.seed)


def _find_similar(
    plans: Sequence[SectionPlan], plan: SectionPlan, *, finished: Sequence[FinishedSection]
) -> ClipFacts | None:
    """Return the measurements of the section that the section of `plan` should resemble, or None.

    This is the first one of the unbroken run of sections that have the same prompt as `plan` and end with `plan`. None
    if `plan` itself is the first of this run.
    """
    first = plan.number
    while first > 1 and plans[first - 2].prompt == plan.prompt:
        first -= 1
    clips = finished[first - 1].file.clips if first < plan.number else ()
    return clips[0] if clips else None


async def _to_end(work: Awaitable[T]) -> T:
    """Return the result of `work`, which runs on a thread. If the caller is cancelled, wait until `work` ends."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise
