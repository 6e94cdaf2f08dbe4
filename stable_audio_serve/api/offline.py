"""A backend without models, used to generate the API description without a server."""

from __future__ import annotations

from collections.abc import Mapping

from stable_audio_serve.core.catalog import ModelCard, ModelCatalog, ModelStatus
from stable_audio_serve.core.errors import ModelUnavailableError
from stable_audio_serve.core.generation import GenerationRequest, GenerationResult, ProgressCallback


class OfflineBackend:
    """A backend with one model. Generating with it fails."""

    def __init__(self) -> None:
        self.catalog = ModelCatalog([ModelCard("none", "none")])

    async def generate(
        self, model: str, request: GenerationRequest, *, on_progress: ProgressCallback | None = None
    ) -> GenerationResult:
        raise ModelUnavailableError("no model is running")

    async def status(self) -> Mapping[str, ModelStatus]:
        return {}
