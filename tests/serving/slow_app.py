"""The application with model replicas that sleep before each request. Import path: `tests.serving.slow_app:build`."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from ray import serve

from stable_audio_serve.core.errors import StableAudioError
from stable_audio_serve.core.generation import GenerationRequest, GenerationResult
from stable_audio_serve.serving.app import assemble
from stable_audio_serve.serving.replica import ModelReplica

WAIT_S = 180.0


class SlowReplica(ModelReplica):
    async def generate(self, request: GenerationRequest) -> GenerationResult | StableAudioError:
        await asyncio.sleep(WAIT_S)
        return await super().generate(request)


def build(args: Mapping[str, Any]) -> serve.Application:
    return assemble(args, replica=SlowReplica)
