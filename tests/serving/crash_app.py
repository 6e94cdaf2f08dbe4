"""The application with a model replica whose engine crashes once. Import path: `tests.serving.crash_app:build`.

The crash happens at the first request with the prompt "crash". The engine's thread ends with an error, as if the device
were lost.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray import serve

from stable_audio_serve.core.errors import StableAudioError
from stable_audio_serve.core.generation import GenerationRequest, GenerationResult
from stable_audio_serve.serving.app import assemble
from stable_audio_serve.serving.replica import ModelReplica

MARK = "CRASHED_ONCE"  # an environment variable with the path of a file that exists after the crash


class CrashingReplica(ModelReplica):
    async def generate(self, request: GenerationRequest) -> GenerationResult | StableAudioError:
        if request.prompt == "crash":
            self._crash_once()
        return await super().generate(request)

    def _crash_once(self) -> None:
        mark = Path(os.environ[MARK])
        if not mark.exists():
            mark.touch()
            self._engine._thread._loop.turn = self._fail  # type: ignore[method-assign]

    def _fail(self) -> bool:
        raise RuntimeError("the device is lost")


def build(args: Mapping[str, Any]) -> serve.Application:
    return assemble(args, replica=CrashingReplica)
