"""A test backend that reads its behaviour from the prompt, because a client in another process can set nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from stable_audio_serve.core.errors import GenerationError
from stable_audio_serve.core.generation import GenerationRequest, GenerationResult, ProgressCallback
from tests.backends import ToneBackend


@dataclass
class PromptBackend(ToneBackend):
    """Takes 30 s for the prompt `slow`, 2 s for `steady` and 0.3 s for any other prompt, and fails for `fail`."""

    pause_s: ClassVar[float] = 0.3
    own_pauses_s: ClassVar[dict[str, float]] = {"slow": 30.0, "steady": 2.0}

    async def generate(
        self, model: str, request: GenerationRequest, *, on_progress: ProgressCallback | None = None
    ) -> GenerationResult:
        self.delay_s = self.own_pauses_s.get(request.prompt, self.pause_s)
        result = await super().generate(model, request)
        if request.prompt == "fail":
            raise GenerationError("the model produced something unusable")
        return result
