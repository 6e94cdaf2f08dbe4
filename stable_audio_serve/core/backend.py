"""The interface through which the HTTP layer and the job runner run models. `serving` implements it with Ray."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from stable_audio_serve.core.catalog import ModelCatalog, ModelStatus
from stable_audio_serve.core.generation import GenerationRequest, GenerationResult, ProgressCallback


class Backend(Protocol):
    """Runs generation requests on the served models. Models are identified by their canonical names, not aliases."""

    @property
    def catalog(self) -> ModelCatalog: ...

    async def generate(
        self, model: str, request: GenerationRequest, *, on_progress: ProgressCallback | None = None
    ) -> GenerationResult:
        """Run one request on a model and return its audio.

        `on_progress` is called on the caller's event loop, at most a few times a second. Cancelling the awaiting task
        cancels the work. Raises InvalidRequestError, OverloadedError, DeadlineExceededError, ModelUnavailableError,
        GenerationError.
        """
        ...

    async def status(self) -> Mapping[str, ModelStatus]:
        """Return the status of each model by canonical name, within a second. Loads no model and waits for none."""
        ...
