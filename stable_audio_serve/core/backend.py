"""The interface through which the HTTP layer and the job runner run models. `serving` implements it with Ray."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from stable_audio_serve.core.catalog import ModelCatalog, ModelStatus
from stable_audio_serve.core.generation import GenerationRequest, GenerationResult, ProgressCallback


class Backend(Protocol):
    """Runs generations by canonical model name."""

    @property
    def catalog(self) -> ModelCatalog: ...

    async def generate(
        self, model: str, request: GenerationRequest, *, on_progress: ProgressCallback | None = None
    ) -> GenerationResult:
        """Run one request on the model with this canonical name. Returns its audio.

        `on_progress` is called on the event loop of the caller, at most a few times a second. Cancelling the awaiting
        task cancels the work. Raises errors of `core.errors`: InvalidRequestError, OverloadedError,
        DeadlineExceededError, ModelUnavailableError, GenerationError.
        """
        ...

    async def status(self) -> Mapping[str, ModelStatus]:
        """Returns the status of each model by canonical name. Never loads a model and never waits for one."""
        ...
