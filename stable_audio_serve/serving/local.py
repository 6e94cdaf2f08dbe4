"""Implements `core.backend.Backend` with engines in this process, without Ray.

Used by the command line's option `--local`, by tests and by benchmarks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from stable_audio_serve.core.catalog import ModelCatalog, ModelStatus
from stable_audio_serve.core.generation import GenerationRequest, GenerationResult, Progress, ProgressCallback
from stable_audio_serve.engine import Engine


class LocalBackend:
    """Runs each generation request on the engine of its model. `async with` starts and closes the engines."""

    def __init__(
        self, catalog: ModelCatalog, engines: Mapping[str, Engine], *, on_progress: ProgressCallback | None = None
    ) -> None:
        """`on_progress` receives the progress of all requests."""
        self._catalog = catalog
        self._engines = engines
        self._on_progress = on_progress

    @property
    def catalog(self) -> ModelCatalog:
        return self._catalog

    async def generate(
        self, model: str, request: GenerationRequest, *, on_progress: ProgressCallback | None = None
    ) -> GenerationResult:
        def report(progress: Progress) -> None:
            for callback in filter(None, (self._on_progress, on_progress)):
                callback(progress)

        return await self._engines[model].generate(request, on_progress=report)

    async def status(self) -> Mapping[str, ModelStatus]:
        """Return the status of each model: ready, with one replica."""
        return {
            name: ModelStatus(stage="ready", num_replicas=1, device=str(engine.device))
            for name, engine in self._engines.items()
        }

    async def __aenter__(self) -> LocalBackend:
        await asyncio.gather(*(engine.start() for engine in self._engines.values()))
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.gather(*(engine.close() for engine in self._engines.values()))
