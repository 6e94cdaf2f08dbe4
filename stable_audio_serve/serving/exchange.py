"""Ingress replicas tell each other whom they told to come again: the next time a client may reach any of them. While no
model is full, they say nothing.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from stable_audio_serve.serving.backend import RayBackend
from stable_audio_serve.serving.overload import Word

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

logger = logging.getLogger(__name__)

EVERY_S = 0.25  # refused clients come after a second or later
_TIMEOUT_S = 0.5


class PromiseExchange:
    """One ingress replica's side of it, on its event loop."""

    def __init__(self, backend: RayBackend, *, ingress: DeploymentHandle) -> None:
        """`ingress` reaches all ingress replicas, this one included."""
        self._backend = backend
        self._ingress = ingress
        self._name = secrets.token_hex(8)
        self._has_failed = False

    async def run(self) -> None:
        """Tell, until cancelled."""
        while True:
            await asyncio.sleep(EVERY_S)
            if words := self._backend.tell():
                try:
                    await self._tell(words)
                except Exception:  # the next time may be better, and what is never told would be kept for ever
                    if not self._has_failed:
                        logger.exception("other ingress replicas cannot be told whom this one refused")
                    self._has_failed = True
                else:
                    self._has_failed = False

    def hear(self, teller: str, words: Mapping[str, Word]) -> None:
        """Note what an ingress replica told all of them, this one included."""
        if teller != self._name:
            self._backend.hear(words)

    async def _tell(self, words: Mapping[str, Word]) -> None:
        response = self._ingress.broadcast("hear_promises", self._name, words)
        try:
            await response.results_async(timeout_s=_TIMEOUT_S, return_exceptions=True)
        except (TimeoutError, RayError, RayServeException) as error:
            logger.debug("an ingress replica did not hear: %s", error)
