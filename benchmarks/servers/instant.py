"""The whole server around an engine that takes no time: what is left is what everything but the engine costs.

`build` is the Ray Serve application, `python -m benchmarks.servers.instant PORT` the same API on uvicorn alone.
`build_remote` is the first around an engine that does take time, but not this machine's: as if it were on another one.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from stable_audio_serve.core.catalog import ModelCatalog, ModelStatus
from stable_audio_serve.core.generation import GenerationRequest, GenerationResult, Progress, ProgressCallback
from stable_audio_serve.core.settings import ModelSettings, Settings

_RATE_HZ = 44_100
REMOTE_S = 0.25


@lru_cache(maxsize=4)
def _clip(samples: int) -> Any:
    """(2, samples) float32: chords under a little noise, as hard to compress as music."""
    t = np.arange(samples) / _RATE_HZ
    tones = sum(
        np.sin(2 * np.pi * hz * t[None] + np.array([[0.0], [phase]])) for phase, hz in enumerate((110, 277, 659))
    )
    noise = np.random.default_rng(0).normal(0.0, 0.02, (2, samples))
    return np.ascontiguousarray(0.2 * tones + noise, dtype=np.float32)


def make_result(model: str, request: GenerationRequest) -> GenerationResult:
    """Returns a clip of the length asked for, stereo at 44.1 kHz."""
    clip = _clip(int(request.duration_s * _RATE_HZ))
    seeds = tuple(request.seed + index for index in range(request.batch_size))
    return GenerationResult((clip,) * request.batch_size, _RATE_HZ, model, seeds)


class InstantBackend:
    """Answers in this process."""

    def __init__(self, catalog: ModelCatalog) -> None:
        self.catalog = catalog

    async def generate(
        self, model: str, request: GenerationRequest, *, on_progress: ProgressCallback | None = None
    ) -> GenerationResult:
        """The same clip for everybody."""
        return make_result(model, request)

    async def status(self) -> Mapping[str, ModelStatus]:
        """Ready."""
        return {card.name: ModelStatus("ready", 1, "cpu") for card in self.catalog}


class InstantReplica:
    """Answers like `serving.replica.ModelReplica`, from another process and at once."""

    def __init__(self, settings: Settings, model: ModelSettings) -> None:
        self._model = model.name

    async def generate(self, request: GenerationRequest) -> GenerationResult:
        """The same clip for everybody."""
        return make_result(self._model, request)

    async def generate_reporting(self, request: GenerationRequest) -> AsyncIterator[Progress | GenerationResult]:
        """The same clip, for a streaming handle."""
        yield Progress("denoising", 0.0)
        yield make_result(self._model, request)

    async def status(self) -> object:
        """Ready, having loaded nothing."""
        from stable_audio_serve.serving.model_states import ReplicaStatus

        counts = dict.fromkeys(("in_flight", "finished", "cancelled", "expired", "failed"), 0)
        return ReplicaStatus(device="cpu", start_s={}, backlog_ms=0.0, quality=None, **counts)


class RemoteReplica(InstantReplica):
    """The same after a while."""

    async def generate_reporting(self, request: GenerationRequest) -> AsyncIterator[Progress | GenerationResult]:
        """The same clip, for a streaming handle."""
        yield Progress("denoising", 0.0)
        await asyncio.sleep(REMOTE_S)
        yield make_result(self._model, request)


def build(args: Settings) -> Any:
    """The application of `serving.app` with instant replicas."""
    from stable_audio_serve.serving.app import assemble

    return assemble(args, replica=InstantReplica)


def build_remote(args: Settings) -> Any:
    """The same with replicas that take `REMOTE_S` for a job."""
    from stable_audio_serve.serving.app import assemble

    return assemble(args, replica=RemoteReplica)


def main() -> None:
    """Serve the API over `InstantBackend` with uvicorn until stopped."""
    import uvicorn

    from stable_audio_serve.api.app import create_app
    from stable_audio_serve.serving.placement import plan_deployments

    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(models=(ModelSettings(name="demo"),), output_dir=folder)
        app = create_app(InstantBackend(plan_deployments(settings).catalog), settings)
        uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), access_log=False)


if __name__ == "__main__":
    main()
