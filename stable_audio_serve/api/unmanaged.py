"""Operator requests to a server without Ray. It is one process, whose models cannot be loaded or unloaded on demand."""

from __future__ import annotations

from stable_audio_serve.api.middleware.draining import Draining
from stable_audio_serve.core.backend import Backend
from stable_audio_serve.core.errors import ModelUnavailableError
from stable_audio_serve.core.operations import DrainReport, ModelReport, ServerReport


class UnmanagedOperations:
    """Implements `core.operations.Operations`. A drain affects this process only, not the job runners."""

    def __init__(self, backend: Backend, draining: Draining) -> None:
        self._backend = backend
        self._draining = draining

    async def report(self) -> ServerReport:
        models = {name: ModelReport(status) for name, status in (await self._backend.status()).items()}
        return ServerReport(models, self._drain_report())

    async def keep(self, model: str) -> None:
        raise ModelUnavailableError(f"model {model} cannot be loaded on demand: this server runs without Ray Serve")

    async def release(self, model: str) -> None:
        raise ModelUnavailableError(f"model {model} cannot be unloaded: this server runs without Ray Serve")

    async def drain(self) -> None:
        self._draining.drain()

    async def resume(self) -> None:
        self._draining.resume()

    def _drain_report(self) -> DrainReport:
        num_left = self._draining.num_left
        if not self._draining.is_draining:
            return DrainReport()
        return DrainReport("draining" if num_left else "drained", num_left)
