"""The server's application, in which each model is one of the compared servers (sides), such as `lock` or `ours`.

The sides have the same weights and share the HTTP proxy, ingress and audio encoders. Ray Serve imports the function
`build`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray import serve

from benchmarks.sides.servers import BATCH_WAIT_S, MAX_BATCH, open_side
from stable_audio_serve.core.errors import StableAudioError
from stable_audio_serve.core.generation import GenerationRequest, GenerationResult
from stable_audio_serve.core.settings import ModelSettings, Settings
from stable_audio_serve.engine import EngineOptions
from stable_audio_serve.models.families import load_model
from stable_audio_serve.serving.app import assemble
from stable_audio_serve.serving.placement import model_entry
from stable_audio_serve.serving.replica import ModelReplica


class SideReplica:
    """A replica that generates audio with the compared server that has the model's name, such as `lock`."""

    def __init__(self, settings: Settings, model: ModelSettings) -> None:
        loaded = load_model(model_entry(model), device=settings.device or "cpu")
        self._device = str(loaded.device)
        self._side = open_side(
            model.name,
            loaded,
            options=EngineOptions(mode=model.mode, torch_threads=model.threads),
            collect=serve.batch(max_batch_size=MAX_BATCH, batch_wait_timeout_s=BATCH_WAIT_S),
        )

    async def generate(self, request: GenerationRequest) -> GenerationResult | StableAudioError:
        try:
            return await self._side.generate(request)
        except StableAudioError as error:
            return error

    def record_routing_stats(self) -> dict[str, str]:
        """Called by Ray Serve. Returns what `/health` and the launcher read."""
        return {"device": self._device}


def build(args: Settings | Mapping[str, Any]) -> serve.Application:
    """Build the application of `serving.app`. The models `lock` and `static` have replicas of the class SideReplica."""
    return assemble(args, replica=ModelReplica, by_name=dict.fromkeys(("lock", "static"), SideReplica))
