"""The quality gate: runs the golden requests on the model of a new replica, compares the audio with a stored report,
and saves a new report if the model passes. Adapters (LoRA) are compared in the same way. A bad adapter does not stop
the model.

Independent of Ray and of where the weights come from. If the artifact store does not answer, a model passes with any
valid audio that is not silent, so that an outage of the store does not stop the models.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from stable_audio_serve.core.catalog import ModelCard
from stable_audio_serve.core.clock import Clock, SystemClock
from stable_audio_serve.core.errors import (
    QualityError,
    QualityReportError,
    StableAudioError,
    StorageError,
)
from stable_audio_serve.core.generation import GenerationRequest, GenerationResult, Lora
from stable_audio_serve.verification.quality.archive import ReportArchive
from stable_audio_serve.verification.quality.report import MOST_CLIPS, LastGood, Report, Setup, Source
from stable_audio_serve.verification.quality.requests import VERSION, golden_requests
from stable_audio_serve.verification.quality.sound import Clip, describe, difference_from_other, difference_from_same

logger = logging.getLogger(__name__)

_MOST_ADAPTERS = 16  # of a model; later ones are not compared
_BUDGET_S = 20.0  # golden requests that have not begun after this time are skipped, except for the first

Generate = Callable[[GenerationRequest], Awaitable[GenerationResult]]
# What the audio was compared with: a pinned report, a report of the same weights, or a report of other weights. Or why
# nothing was compared: there is no report yet ("new"), or the report cannot be read ("unchecked").
Basis = Literal["pinned", "same", "other", "new", "unchecked"]


@dataclass(frozen=True, slots=True)
class Passed:
    """How a model passed. `basis` says what the model's audio was compared with.

    `report` is the id of the report for the model's `Setup`. If `basis` is "unchecked", `problem` is the reason.
    `adapter_faults` maps the name of each bad adapter to a message.
    """

    basis: Basis
    report: str
    problem: str | None = None
    adapter_faults: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Reference:
    basis: Basis
    report: Report | None = None
    problem: str | None = None
    should_save: bool = True  # whether to save the report of this run


class QualityGate:
    """Decides whether loaded models pass, and saves reports of models that pass."""

    def __init__(self, archive: ReportArchive, *, clock: Clock = SystemClock()) -> None:
        self._archive = archive
        self._clock = clock

    async def judge(
        self,
        card: ModelCard,
        generate: Generate,
        *,
        setup: Setup,
        source: Source,
        pinned: str | None = None,
        adapters: Sequence[Lora] = (),
    ) -> Passed:
        """Run the golden requests and compare the audio with a report. Return how the model passed.

        Raises QualityError with the failed request and the reason if the model does not pass. Bad adapters are in the
        returned value, and raise no error. `adapters` must have hashes. Raises QualityReportError if the pinned report
        does not exist or cannot be used.
        """
        ends_at = self._clock.monotonic() + _BUDGET_S
        clips = await self._run(card, generate, ends_at=ends_at)
        reference = await self._find_reference(setup, source, pinned=pinned)
        _compare(clips, reference)
        adapted, faults = await self._run_adapted(card, generate, adapters=adapters, ends_at=ends_at)
        faults |= _compare_adapted(adapted, reference)
        if reference.should_save:
            good = {_clip_name(lora): clip for lora, clip in adapted.items() if lora.name not in faults}
            report = Report(setup, source, self._clock.time(), {**clips, **good}, kind="report", version=VERSION)
            await self._save(report)
        return Passed(reference.basis, setup.report_id, reference.problem, faults)

    async def _run_adapted(
        self, card: ModelCard, generate: Generate, *, adapters: Sequence[Lora], ends_at: float
    ) -> tuple[Mapping[Lora, Clip], dict[str, str]]:
        """Run one golden request with each adapter. Return the clips, and the error messages of failed adapters."""
        name, request = next(iter(golden_requests(card).items()))
        clips: dict[Lora, Clip] = {}
        faults: dict[str, str] = {}
        for lora in adapters[:_MOST_ADAPTERS]:
            if self._clock.monotonic() >= ends_at:
                logger.warning("quality gate: model=%s no time for adapter %s and later ones", card.name, lora.name)
                break
            try:
                result = await generate(replace(request, loras=(lora,)))
                clips[lora] = _describe(result, request, card=card, name=name)
            except StableAudioError as error:
                faults[lora.name] = error.message
        return clips, faults

    async def _run(self, card: ModelCard, generate: Generate, *, ends_at: float) -> Mapping[str, Clip]:
        clips: dict[str, Clip] = {}
        for name, request in golden_requests(card).items():
            if clips and self._clock.monotonic() >= ends_at:
                logger.warning("quality gate: model=%s no time for request %s and later ones", card.name, name)
                break
            try:
                result = await generate(request)
            except StableAudioError as error:
                raise QualityError(f"golden request {name}: {error.message}") from error
            clips[name] = _describe(result, request, card=card, name=name)
        return clips

    async def _find_reference(self, setup: Setup, source: Source, *, pinned: str | None) -> _Reference:
        try:
            if pinned is not None:
                return await self._find_pinned(pinned)
            report = await self._archive.report(setup.report_id)
            if report is not None:
                return _Reference("same", report)
            return await self._find_other(setup, source)
        except StorageError as error:
            problem = f"nothing to compare with: {error.message}"
            logger.warning("quality gate: model=%s passes without a comparison: %s", setup.model, problem)
            return _Reference("unchecked", problem=problem, should_save=False)
        except QualityReportError as error:
            if pinned is not None:
                raise
            logger.error("quality gate: model=%s passes without a comparison: %s", setup.model, error.message)
            return _Reference("unchecked", problem=error.message, should_save=False)

    async def _find_pinned(self, pinned: str) -> _Reference:
        report = await self._archive.report(pinned)
        if report is None:
            raise QualityReportError(f"quality_report: there is no quality report {pinned} in the artifact store")
        return _Reference("pinned", report)

    async def _find_other(self, setup: Setup, source: Source) -> _Reference:
        """Return the report of the model's last good weights, for the device and the precision of `setup`.

        Raises QualityError if the files of the same commit of a repository have changed since the model last passed.
        """
        good = await self._archive.last_good(setup.model)
        if good is None or good.weights == setup.weights:
            return _Reference("new")
        if source.commit is not None and good.source == source:
            raise QualityError(f"the files of {source} differ from the files that passed before: the cache was changed")
        report = await self._archive.report(replace(setup, weights=good.weights).report_id)
        return _Reference("new") if report is None else _Reference("other", report)

    async def _save(self, report: Report) -> None:
        """Record the report's weights as last good, and save the report.

        If a report of the same setup is stored already, only clips with new names are added to the stored report. The
        earlier clips stay, because replacing them each time would allow slow drift.
        """
        setup = report.setup
        try:
            known = await self._archive.report(setup.report_id)
            if known is None:
                await self._archive.save(report)
            elif new := {name: clip for name, clip in report.clips.items() if name not in known.clips}:
                await self._archive.save(replace(known, clips=dict([*known.clips.items(), *new.items()][:MOST_CLIPS])))
            await self._archive.save_last_good(
                LastGood(setup.model, setup.weights, report.source, kind="last good", version=VERSION)
            )
        except (StorageError, QualityReportError) as error:
            logger.warning("quality gate: model=%s: its report is not kept: %s", report.setup.model, error.message)


def _describe(result: GenerationResult, request: GenerationRequest, *, card: ModelCard, name: str) -> Clip:
    """Return the description of a result. Raises QualityError for a wrong shape, non-finite values, or silence."""
    (audio,) = result.audio
    num_samples = request.duration_s * result.sample_rate_hz
    if audio.ndim != 2 or audio.shape[0] != card.channels or abs(audio.shape[1] - num_samples) > 1:
        shape = "x".join(map(str, audio.shape))
        raise QualityError(f"golden request {name}: {shape} samples, not {card.channels}x{num_samples:g}")
    if not np.isfinite(audio).all():
        raise QualityError(f"golden request {name}: samples that are not finite")
    clip = describe(audio, result.sample_rate_hz)
    if clip.is_silent:
        raise QualityError(f"golden request {name}: silence")
    return clip


def _compare(clips: Mapping[str, Clip], reference: _Reference) -> None:
    """Raise QualityError for the first clip that differs too much from the reference.

    Raises QualityReportError if the reference has none of the clips.
    """
    report = reference.report
    if report is None:
        return
    differ = difference_from_other if reference.basis == "other" else difference_from_same
    common = [name for name in clips if name in report.clips]
    if not common:
        raise QualityReportError(f"quality report {report.setup.report_id} has none of the golden requests")
    for name in common:
        if fault := differ(clips[name], report.clips[name]):
            raise QualityError(f"golden request {name}: {fault} (quality report {report.setup.report_id})")


def _clip_name(lora: Lora) -> str:
    return f"adapter {lora.sha256}{' with conditioners' if lora.has_conditioners else ''}"


def _compare_adapted(clips: Mapping[Lora, Clip], reference: _Reference) -> dict[str, str]:
    """Return a message for each adapter whose clip differs too much from the stored clip with the same adapter.

    Nothing is compared if the stored clips are from other weights.
    """
    if reference.report is None or reference.basis == "other":
        return {}
    before = reference.report.clips
    differences = {
        lora.name: difference_from_same(clip, before[name])
        for lora, clip in clips.items()
        if (name := _clip_name(lora)) in before
    }
    return {name: fault for name, fault in differences.items() if fault is not None}
