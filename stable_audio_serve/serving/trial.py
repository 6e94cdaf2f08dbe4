"""Start a replica's engine: load the model, warm it up, and compare its audio with the quality report (quality gate).

If the configured weights fail, the engine uses the last good weights, which are the weights that last passed the gate.
This module does not depend on Ray Serve: a callback returns whether other replicas of the model answer requests.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import re
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from stable_audio_serve.artifacts.store import ArtifactStore
from stable_audio_serve.core.catalog import GateOutcome, ModelQuality
from stable_audio_serve.core.errors import (
    CheckpointError,
    InvalidRequestError,
    ModelUnavailableError,
    QualityError,
    QualityReportError,
    StableAudioError,
    StorageError,
)
from stable_audio_serve.core.generation import Lora
from stable_audio_serve.core.metrics import Metrics
from stable_audio_serve.core.settings import ModelSettings, Settings
from stable_audio_serve.engine import Engine
from stable_audio_serve.models.adapters.header import inspect_file
from stable_audio_serve.models.families import find_files
from stable_audio_serve.models.registry import ModelEntry
from stable_audio_serve.models.weight_hash import hash_weights
from stable_audio_serve.serving.adapters import adapter_fetcher
from stable_audio_serve.serving.engines import precisions
from stable_audio_serve.serving.placement import model_entry
from stable_audio_serve.verification.quality.archive import ReportArchive
from stable_audio_serve.verification.quality.gate import QualityGate
from stable_audio_serve.verification.quality.report import LastGood, Setup, Source

logger = logging.getLogger(__name__)

Load = Callable[[ModelEntry], Engine]  # returns an engine that is not started; blocking
Stage = Callable[[str], AbstractContextManager[None]]  # measures how long the context takes, under the given name

_COMMIT = re.compile(r"[0-9a-f]{40}")

# Errors that other weights may not have. ConfigError is not included, because an invalid setting affects all weights.
_FAULTS = (CheckpointError, ModelUnavailableError, QualityError, QualityReportError)


@dataclass(frozen=True, slots=True)
class Started:
    """A started engine, and the result of its quality gate."""

    engine: Engine
    quality: ModelQuality


class Trial:
    """Starts the engine of one replica with the configured weights, or if they fail, with the last good weights."""

    def __init__(
        self,
        settings: Settings,
        model: ModelSettings,
        *,
        artifacts: ArtifactStore,
        load: Load,
        others_answer: Callable[[], Awaitable[bool]],
        stage: Stage,
        metrics: Metrics,
    ) -> None:
        """`others_answer` returns whether other replicas of this model keep answering if this one fails to start."""
        self._settings = settings
        self._model = model
        self._archive = ReportArchive(artifacts)
        self._gate = QualityGate(self._archive)
        self._load = load
        self._others_answer = others_answer
        self._stage = stage
        self._metrics = metrics
        self._tried: Source | None = None

    async def run(self) -> Started:
        """Return an engine with the configured weights, or if they fail, with the last good weights.

        The last good weights are used only if no other replica answers requests. If another replica does, or if the
        last good weights fail too, the method raises an error of the type that the configured weights raised.
        """
        self._metrics.gauge("quality_fallback", 0)
        entry = model_entry(self._model)
        try:
            started = await self._try(entry, pinned=self._model.quality_report)
            self._metrics.increment("quality_gates", outcome=started.quality.gate)
            return started
        except _FAULTS as error:
            # A copy without the traceback, whose frames would keep the failed model in memory.
            fault: StableAudioError = type(error)(error.message)
        self._metrics.increment("quality_gates", outcome="failed")
        logger.error("new replica failed: model=%s kind=%s %s", self._model.name, fault.kind, fault.message)
        _free_memory()
        if await self._others_answer():
            raise fault
        return await self._fall_back(entry, fault)

    async def skip(self) -> Started:
        """Return an engine with the configured weights, without a look at its audio."""
        return await self._try(model_entry(self._model), is_judged=False)

    async def _fall_back(self, entry: ModelEntry, fault: StableAudioError) -> Started:
        good = await self._find_last_good(entry, fault)
        logger.warning("loading the last good weights: model=%s %s", self._model.name, good.source)
        try:
            started = await self._try(_entry_of(good, entry), expected=good.weights)
        except _FAULTS as error:
            message = f"{fault.message}; its last good weights, {good.source}, fail too: {error.message}"
            raise type(fault)(message) from None
        self._metrics.gauge("quality_fallback", 1)
        return replace(started, quality=replace(started.quality, gate="fallback", problem=_for_clients(fault)))

    async def _find_last_good(self, entry: ModelEntry, fault: StableAudioError) -> LastGood:
        """Return the last good weights. If there are none, raise an error like `fault` that also gives the reason."""
        try:
            good = await self._archive.last_good(self._model.name)
        except (StorageError, QualityReportError) as error:
            raise _without_fallback(fault, error.message) from None
        if good is None:  # no replica of this model has ever passed the gate
            raise fault
        if good.source == self._tried:
            raise _without_fallback(fault, f"{good.source} is where they were, and there is no copy")
        if good.source.folder is None and (good.source.commit is None or good.source.repo_id != entry.repo_id):
            raise _without_fallback(fault, f"{good.source} is not in the configured repository")
        return good

    async def _try(
        self, entry: ModelEntry, *, pinned: str | None = None, expected: str | None = None, is_judged: bool = True
    ) -> Started:
        """Load the model described by `entry`, start its engine, and if `is_judged` is true, run the quality gate.

        `pinned` is the id of the quality report that the model must match. None means the report of the loaded weights.
        `expected` is the hash that the weights must have. None allows any hash. Closes the engine after an error.
        Raises one of `_FAULTS` or ConfigError.
        """
        with self._stage("load"):
            self._tried = None
            folder, text_encoder = find_files(entry, token=self._settings.hub_token)
            self._tried = source = _source(entry, folder)
            hashing = asyncio.get_running_loop().run_in_executor(None, hash_weights, folder, text_encoder)
            try:
                engine = self._load(replace(entry, folder=str(folder), repo_id=None))
            except BaseException:
                await asyncio.wait([hashing])
                raise
        try:
            with self._stage("warm_up"):
                await engine.start()
            with self._stage("hash"):
                weights = await hashing
            if expected not in (None, weights):
                raise CheckpointError(f"{source} has changed since it passed")
            engine.name_checkpoint(weights)
            quality = ModelQuality("off", weights)
            if is_judged:
                with self._stage("quality_gate"):
                    quality = await self._judge(engine, weights, source=source, pinned=pinned)
        except BaseException:
            await engine.close()
            await asyncio.wait([hashing])
            raise
        return Started(engine, quality)

    async def _judge(self, engine: Engine, weights: str, *, source: Source, pinned: str | None) -> ModelQuality:
        setup = Setup(self._model.name, weights, **precisions(self._settings, self._model, device=engine.device))
        adapters: list[Lora] = []
        unreadable: dict[str, str] = {}
        if engine.spec.card.takes_adapters and self._model.loras:
            read = partial(_configured_adapters, self._settings, self._model)
            adapters, unreadable = await asyncio.to_thread(read)
        passed = await self._gate.judge(
            engine.spec.card, engine.generate, setup=setup, source=source, pinned=pinned, adapters=adapters
        )
        faults = {**unreadable, **passed.adapter_faults}
        for name, fault in faults.items():
            self._metrics.increment("quality_gates", outcome="adapter_failed")
            logger.error("quality gate: model=%s adapter=%s %s", self._model.name, name, fault)
        facts = (setup.model, passed.basis, passed.report, weights)
        logger.info("quality gate passed: model=%s basis=%s report=%s weights=%s", *facts)
        gate: GateOutcome = "unchecked" if passed.basis == "unchecked" else "passed"
        problems = [] if passed.problem is None else ["no report could be read for comparison; see the server's log"]
        problems += [f"the adapter {name} is bad; see the server's log" for name in faults]
        return ModelQuality(gate, weights, source.commit, passed.report, "; ".join(problems) or None)


def _configured_adapters(settings: Settings, model: ModelSettings) -> tuple[list[Lora], dict[str, str]]:
    """Return the adapters of a model's configuration, with hashes, and the error message for each unreadable one.

    Blocking.
    """
    fetch, adapters, faults = adapter_fetcher(settings), [], {}
    for name, one in model.loras.items():
        try:
            facts = inspect_file(
                fetch(one.path), name=name, max_rank=model.max_lora_rank, with_conditioners=one.conditioner
            )
        except InvalidRequestError as error:
            faults[name] = error.message
        else:
            adapters.append(Lora(name, source=one.path, sha256=facts.sha256, has_conditioners=one.conditioner))
    return adapters, faults


def _source(entry: ModelEntry, folder: Path) -> Source:
    """Return where the model's files in `folder` come from: a repository's commit, or the folder itself.

    In the cache of the Hugging Face hub, the name of a folder with downloaded files is the commit.
    """
    if entry.folder is not None or not _COMMIT.fullmatch(folder.name):
        return Source(folder=str(folder.absolute()))
    return Source(repo_id=entry.repo_id, commit=folder.name)


def _entry_of(good: LastGood, entry: ModelEntry) -> ModelEntry:
    if good.source.folder is not None:
        return replace(entry, folder=good.source.folder, repo_id=None, revision=None)
    return replace(entry, folder=None, revision=good.source.commit)


def _without_fallback(fault: StableAudioError, reason: str) -> StableAudioError:
    return type(fault)(f"{fault.message}; there are no last good weights to fall back to: {reason}")


def _for_clients(fault: StableAudioError) -> str:
    """Return the message that clients see. It quotes no errors about files, which contain paths of this machine."""
    why = fault.message if isinstance(fault, QualityError) else "they cannot be loaded"
    return f"the configured weights failed ({why}); the last good ones are in use"


def _free_memory() -> None:
    """Free the memory of a failed model before another one is loaded on the same device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
