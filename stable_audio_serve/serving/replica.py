"""A Ray Serve replica of a model: loads the model, warms it up, generates audio and publishes statistics."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import ray
from ray import serve
from ray.serve.schema import ReplicaState

from stable_audio_serve.core.catalog import ModelQuality
from stable_audio_serve.core.errors import ModelUnavailableError, StableAudioError
from stable_audio_serve.core.generation import GenerationRequest, GenerationResult, Progress, ProgressCallback
from stable_audio_serve.core.settings import ModelSettings, Settings
from stable_audio_serve.jobs.open import open_artifacts
from stable_audio_serve.serving.autoscaling import autoscaling_stats
from stable_audio_serve.serving.logs import configure_logging
from stable_audio_serve.serving.metrics import RayMetrics, RecentSum, StepMeter
from stable_audio_serve.serving.model_states import read_application
from stable_audio_serve.serving.work_ledger import ReplicaWork

if TYPE_CHECKING:
    from stable_audio_serve.engine import Engine

logger = logging.getLogger(__name__)

_MINUTE_S = 60
_MIN_INTERVAL_S = 0.1
# Without a report from a job runner for this long, the replica assumes that no jobs wait for its model.
_WAITING_TTL_S = 5.0
# Without a report from a job runner for this long, the replica assumes that no operator keeps the model loaded. Ray
# Serve can replace a dead runner in this time.
_KEPT_TTL_S = 60.0
# Seconds between two progress reports. Sending one takes half a millisecond in both the sender and the receiver.
_PROGRESS_INTERVAL_S = 0.25


class ModelReplica:
    """A Ray Serve replica with one engine. Its construction ends when the model is loaded and warmed up."""

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits this
        self, settings: Settings, model: ModelSettings
    ) -> None:
        configure_logging(settings.log_level)
        self._in_flight = 0
        self._finished = RecentSum(_MINUTE_S)
        self._start_s: dict[str, float] = {}
        # When the last autoscaling statistics were made, and for how many seconds the device had worked until then.
        self._measured_at = time.monotonic(), 0.0
        # The values of the last `note_waiting` and its time.
        self._waiting_s, self._is_kept, self._reported_at = 0.0, False, float("-inf")
        try:
            self._engine, self._quality = await self._start(settings, model)
        except StableAudioError as error:
            # Ray Serve prints the cause of an exception before the exception itself. The cause gets the same message,
            # so that the message is at the top.
            raise ModelUnavailableError(error.message) from type(error)(error.message)
        stages = " ".join(f"{name}_s={seconds:.2f}" for name, seconds in self._start_s.items())
        engine = self._engine
        logger.info(
            "model ready: model=%s device=%s profile=%s %s", model.name, engine.device, engine.profile.name, stages
        )
        if engine.spec.attention:
            logger.info("attention: model=%s kernels=%s", model.name, engine.spec.attention)
        if engine.memory.parts():
            logger.info("memory: model=%s %s", model.name, engine.memory)

    async def _start(self, settings: Settings, model: ModelSettings) -> tuple[Engine, ModelQuality]:
        with self._stage("import"):
            from stable_audio_serve.serving.engines import fetch_files, load_engine, speed_hint
            from stable_audio_serve.serving.trial import Trial
        with self._stage("load"):
            fetch_files(settings, model)
        metrics = RayMetrics(model=model.name)
        self._meter = StepMeter(metrics)
        gpu_share = ray.get_runtime_context().get_assigned_resources().get("GPU", 0.0)
        load = partial(
            load_engine,
            settings,
            model,
            gpu_share=gpu_share,
            cluster_gpus=ray.cluster_resources().get("GPU", 0.0),
            metrics=self._meter,
        )
        artifacts = open_artifacts(settings, is_prepared=True)
        trial = Trial(
            settings,
            model,
            artifacts=artifacts,
            load=lambda entry: load(entry=entry),
            others_answer=partial(_others_answer, surge=bool(model.replicas.surge)),
            stage=self._stage,
            metrics=metrics,
        )
        started = await (trial.run() if settings.quality_gate.enabled else trial.skip())
        await artifacts.close()
        self._meter.open()
        if hint := speed_hint(settings, model, device=started.engine.device, gpu_share=gpu_share):
            logger.warning("%s", hint)
        return started.engine, started.quality

    async def generate(
        self, request: GenerationRequest, *, on_progress: ProgressCallback | None = None
    ) -> GenerationResult | StableAudioError:
        """Run one request, whose `deadline_s` counts from now.

        A StableAudioError is returned, not raised, because Ray Serve logs raised exceptions with a traceback.
        """
        self._in_flight += 1
        try:
            result = await self._engine.generate(request, on_progress)
        except StableAudioError as error:
            if self._engine.has_crashed:
                # A process that lives on would fail further requests at once, and look idle to the routers. If it ends,
                # Ray Serve replaces it, and its requests are repeated on another replica.
                logger.critical("the engine has crashed: the replica ends")
                os._exit(1)
            return error
        finally:
            self._in_flight -= 1
        self._finished.add()
        return result

    async def generate_reporting(
        self, request: GenerationRequest
    ) -> AsyncIterator[Progress | GenerationResult | StableAudioError]:
        """Run one request: yield its latest progress four times a second, and finally what `generate` returns."""
        latest: deque[Progress] = deque(maxlen=1)
        working = asyncio.create_task(self.generate(request, on_progress=latest.append))
        try:
            while not (await asyncio.wait({working}, timeout=_PROGRESS_INTERVAL_S))[0]:
                if latest:
                    yield latest.pop()
            yield working.result()
        finally:
            working.cancel()  # if the caller has disconnected; has no effect if the work is finished

    def record_routing_stats(self) -> dict[str, Any]:
        """Return the statistics for this model's request routers, which also record them for `/v1/status`.

        Called by Ray Serve every second.
        """
        work = ReplicaWork.now(
            self._engine.backlog_ms, self._engine.prices(), adapters=self._engine.adapters_in_memory()
        )
        return work.to_dict() | {
            "device": str(self._engine.device),
            "dtype": self._engine.dtype,
            "profile": self._engine.describe_profile(),
            "memory_bytes": self._engine.memory.parts(),
            "requests": self._in_flight,
            "rows_per_step": self._meter.rows_per_step,
            "requests_per_minute": int(self._finished.total),
            "start_s": self._start_s,
            "quality": asdict(self._quality),
        }

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Return the statistics for this model's autoscaling policy. Called by Ray Serve every second."""
        now, busy_s = time.monotonic(), self._engine.busy_s
        before, busy_before_s = self._measured_at
        self._measured_at = now, busy_s
        report_age_s = now - self._reported_at
        return autoscaling_stats(
            work_s=self._engine.backlog_ms / 1000.0,
            busy_share=min(max(busy_s - busy_before_s, 0.0) / max(now - before, _MIN_INTERVAL_S), 1.0),
            waiting_s=self._waiting_s if report_age_s < _WAITING_TTL_S else 0.0,
            is_kept=self._is_kept and report_age_s < _KEPT_TTL_S,
        )

    async def note_waiting(self, seconds: float, is_kept: bool = False) -> None:
        """Record the predicted seconds of the jobs that wait for this model, and whether an operator keeps it loaded.

        Job runners call this every second if there are such jobs or the model is kept loaded.
        """
        self._waiting_s, self._is_kept, self._reported_at = seconds, is_kept, time.monotonic()

    async def check_health(self) -> None:
        """Raise ModelUnavailableError if the engine failed. Called by Ray Serve, which then replaces this replica."""
        self._engine.check_health()

    async def __del__(self) -> None:
        # Ray Serve awaits this after a failed start. When it stops the replica, it awaits this after the requests in
        # flight have ended or run out of time.
        if hasattr(self, "_engine"):
            await self._engine.close()

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        started_at = time.monotonic()
        yield
        self._start_s[name] = self._start_s.get(name, 0.0) + time.monotonic() - started_at


async def _others_answer(*, surge: bool) -> bool:
    """Return True if older replicas of this model keep answering requests even if this replica fails to start.

    With the setting `surge`, an update stops an older replica only after a new one has started. Without `surge`, the
    update stops the older replicas one after another, even if the new ones fail. Then this replica must start, if
    necessary with the last good weights.
    """
    if not surge:
        return False
    mine = serve.get_replica_context()
    application = await asyncio.to_thread(read_application, mine.app_name)
    deployment = application.deployments.get(mine.deployment) if application else None
    return bool(deployment and deployment.replica_states.get(ReplicaState.RUNNING))
