"""A backend whose behaviour clients choose by prompt, because they cannot reach the test's own objects."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from stable_audio_serve.core.errors import GenerationError
from stable_audio_serve.core.generation import GenerationRequest, GenerationResult, ProgressCallback
from tests.backends import ToneBackend


@dataclass
class PromptBackend(ToneBackend):
    """`slow` takes half a minute, `fail` fails, everything else takes `pause_s`."""

    pause_s: ClassVar[float] = 0.3

    async def generate(
        self, model: str, request: GenerationRequest, *, on_progress: ProgressCallback | None = None
    ) -> GenerationResult:
        self.delay_s = 30.0 if request.prompt == "slow" else self.pause_s
        result = await super().generate(model, request)
        if request.prompt == "fail":
            raise GenerationError("the model produced something unusable")
        return result
