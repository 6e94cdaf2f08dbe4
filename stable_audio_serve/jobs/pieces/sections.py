"""Long pieces: check and plan their sections, and read the audio of finished sections.

A section continues the last `overlap_s` seconds of the audio before it. In the last 30 ms of that audio, a linear
crossfade leads to the section. So each section changes only the last 30 ms of the section before it.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from stable_audio_serve.artifacts.store import StoredFile
from stable_audio_serve.audio.section_files import SectionDecoder
from stable_audio_serve.audio.section_joins import join_samples
from stable_audio_serve.core.catalog import ModelCard
from stable_audio_serve.core.errors import DamagedFileError, InvalidRequestError, StorageError
from stable_audio_serve.core.generation import SEED_LIMIT, GenerationRequest, Section, SourceAudio
from stable_audio_serve.core.pricing import Defaults, WorkSize
from stable_audio_serve.core.settings import ApiSettings
from stable_audio_serve.core.sound import Peaks
from stable_audio_serve.jobs.job import FinishedSection, JobSpec

if TYPE_CHECKING:
    import numpy.typing as npt

LEAST_SECTION_S = 1.0  # much longer than the crossfade of 30 ms
LEAST_OVERLAP_S = 0.1
_USUAL_OVERLAP_S = 12.0
_MORE_S = 1.0
_LARGEST_SAMPLE = 16.0  # sections have a peak of about 1


class LostSectionError(StorageError):
    """The file of the finished section `number` is gone or damaged."""

    def __init__(self, number: int) -> None:
        super().__init__(f"the file of section {number} is gone or damaged")
        self.number = number


@dataclass(frozen=True, slots=True)
class SectionPlan:
    """What one section needs. All lengths are in samples.

    The section is [start, stop) of the piece. It continues the `context` samples before `start`. The model generates
    `more` samples after it, which are cut off, because models let the end of a clip fade or swell.
    """

    number: int  # from 1
    start: int
    stop: int
    context: int
    more: int
    seed: int
    prompt: str

    @property
    def num_generated(self) -> int:
        """The length of the model's output: the context, the section, and what is cut off."""
        return self.context + self.stop - self.start + self.more


def longest_s(card: ModelCard, limits: ApiSettings) -> float:
    """Return the longest clip that a model may generate, seconds. A section plus its overlap may not be longer."""
    return min(card.max_duration_s, limits.max_duration_s)


def section_peaks(peaks: Peaks) -> Peaks:
    """Return how the peaks of a piece with sections are handled if `peaks` is requested.

    A section is final before the peak of the whole piece is known, so that peak cannot scale the sections.
    """
    return "limit" if peaks == "scale" else peaks


def choose_overlap(overlap_s: float | None, *, card: ModelCard, limits: ApiSettings) -> float:
    """Return the overlap of sections: `overlap_s`, or if that is None, 12 s or half the longest clip of the model."""
    return min(_USUAL_OVERLAP_S, longest_s(card, limits) / 2) if overlap_s is None else overlap_s


def find_faults(
    sections: Sequence[Section], *, overlap_s: float, card: ModelCard, limits: ApiSettings
) -> list[InvalidRequestError]:
    """Return an error for each invalid value of a long piece.

    The errors' fields are `overlap_s`, `sections` and `sections.2.duration`, where 2 is the index of the section.
    """
    most_s = longest_s(card, limits)
    name = f"the model {card.name}" if card.max_duration_s <= limits.max_duration_s else "api.max_duration_s"
    faults = []
    if not LEAST_OVERLAP_S <= overlap_s <= most_s / 2:
        allowed = f"{LEAST_OVERLAP_S:g}..{most_s / 2:g}"
        message = f"overlap_s must be from {LEAST_OVERLAP_S:g} to {most_s / 2:g}, half the longest clip of {name}"
        faults.append(InvalidRequestError(message, field="overlap_s", allowed=allowed))
        # The sections are checked against the nearest allowed overlap, so that their errors name a range that exists.
        overlap_s = min(max(overlap_s, LEAST_OVERLAP_S), most_s / 2)
    most_own_s = most_s - overlap_s
    for index, section in enumerate(sections):
        field = f"sections.{index}.duration"
        if not LEAST_SECTION_S <= section.duration_s <= most_own_s:
            message = (
                f"{field} must be from {LEAST_SECTION_S:g} to {most_own_s:g}: duration and overlap_s ({overlap_s:g}) "
                f"must be at most {most_s:g} together ({name})"
            )
            faults.append(InvalidRequestError(message, field=field, allowed=f"{LEAST_SECTION_S:g}..{most_own_s:g}"))
    total_s = total_duration_s(sections)
    if total_s > limits.max_long_s:
        message = f"sections must last at most {limits.max_long_s:g} s together (api.max_long_s), not {total_s:g}"
        faults.append(InvalidRequestError(message, field="sections", allowed=f"0..{limits.max_long_s:g}"))
    return faults


def total_duration_s(sections: Sequence[Section]) -> float:
    """Return the length of a long piece, seconds."""
    return round(sum(section.duration_s for section in sections), 9)  # without the rounding errors of sums


def plan_sections(spec: JobSpec, card: ModelCard) -> list[SectionPlan]:
    """Return the plan of each section of a long piece."""
    rate_hz = card.sample_rate_hz
    most, overlap = int(card.max_duration_s * rate_hz), round(spec.overlap_s * rate_hz)
    plans: list[SectionPlan] = []
    start = 0
    for index, section in enumerate(spec.sections):
        stop = int(total_duration_s(spec.sections[: index + 1]) * rate_hz)
        room = max(most - (stop - start), 0)
        context = min(overlap, start, room)
        is_last = index == len(spec.sections) - 1
        plans.append(
            SectionPlan(
                number=index + 1,
                start=start,
                stop=stop,
                context=context,
                more=0 if is_last else min(round(_MORE_S * rate_hz), room - context),
                seed=(spec.request.seed + index) % SEED_LIMIT,
                prompt=spec.request.prompt if section.prompt is None else section.prompt,
            )
        )
        start = stop
    return plans


def make_request(spec: JobSpec, plan: SectionPlan, *, card: ModelCard, before: SourceAudio | None) -> GenerationRequest:
    """Return the request that generates a section.

    `before` are the `plan.context` samples before the section, or None if `plan.context` is 0.
    """
    rate_hz = card.sample_rate_hz
    # Half a sample more, because engines round down.
    duration_s = min((plan.num_generated + 0.5) / rate_hz, card.max_duration_s)
    request = replace(spec.request, prompt=plan.prompt, seed=plan.seed, batch_size=1, duration_s=duration_s)
    if before is None:
        return request
    region = (plan.context / rate_hz, duration_s)
    return replace(request, inpaint_audio=before, inpaint_regions_s=(region,), keep="source")


def sizes_of(spec: JobSpec, *, model: Defaults) -> list[WorkSize]:
    """Return how much work each request of a job is. A long piece has one request for each section."""
    if not spec.sections:
        return [WorkSize.of(spec.request, model=model)]
    return [
        WorkSize.of(replace(spec.request, duration_s=section.duration_s + spec.overlap_s * bool(index)), model=model)
        for index, section in enumerate(spec.sections)
    ]


def num_final_samples(section: FinishedSection, *, is_last: bool) -> int:
    """Return how many samples of the section's file are part of the piece.

    These are all samples if the section is the last one. Otherwise, the next section's file replaces the last 30 ms.
    """
    return section.num_samples - (0 if is_last else join_samples(section.sample_rate_hz))


async def read_section(
    read: Callable[[StoredFile], AsyncGenerator[bytes]], section: FinishedSection, *, stop: int, start: int = 0
) -> AsyncGenerator[npt.NDArray[np.float32]]:
    """Yield the samples [start, stop) of a section's file in blocks (C, S) float32. Reads and verifies the whole file.

    `read` yields the bytes of a file, see `ArtifactStore.read`.
    Raises StorageError, LostSectionError.
    """
    decoder = SectionDecoder(num_bytes=section.file.num_bytes, num_samples=section.num_samples)
    position = 0
    try:
        async with aclosing(read(section.file)) as chunks:
            async for chunk in chunks:
                block = decoder.decode(chunk)
                if not (np.abs(block) <= _LARGEST_SAMPLE).all():  # LAME ends the process if they are not finite
                    raise LostSectionError(section.number)
                own = block[:, max(start - position, 0) : max(stop - position, 0)]
                position += block.shape[1]
                if own.shape[1]:
                    yield own
    except (FileNotFoundError, DamagedFileError) as error:
        raise LostSectionError(section.number) from error


async def read_end(
    read: Callable[[StoredFile], AsyncGenerator[bytes]], sections: Sequence[FinishedSection], *, num_samples: int
) -> npt.NDArray[np.float32]:
    """Return the last `num_samples` samples (C, S) float32 of the audio of `sections`. Raises StorageError."""
    parts: list[npt.NDArray[np.float32]] = []
    missing = num_samples
    for section in reversed(sections):
        stop = num_final_samples(section, is_last=section is sections[-1])
        start = max(stop - missing, 0)
        parts[:0] = [block async for block in read_section(read, section, start=start, stop=stop)]
        missing -= stop - start
        if not missing:
            break
    return np.concatenate(parts, axis=1)
