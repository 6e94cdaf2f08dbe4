"""Repeat calls of the job store until the job database answers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from stable_audio_serve.core.errors import StorageError

P = ParamSpec("P")
T = TypeVar("T")


class PatientCalls:
    """Calls functions of the job store in threads, again and again until the database answers."""

    def __init__(self, *, retry_s: float) -> None:
        """After an error of the database, a call is repeated after `retry_s` seconds."""
        self._retry_s = retry_s

    async def call(self, function: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
        """Call `function` until it raises no StorageError, and return its result.

        If the database is down for long, the lease of a job may expire. Then `function` cannot change the job any more.
        """
        while True:
            try:
                return await asyncio.to_thread(function, *args, **options)
            except StorageError:
                await asyncio.sleep(self._retry_s)
