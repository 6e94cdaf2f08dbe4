"""One way to ask any side for what an arrival describes, in this process or over HTTP, and to read what came back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from benchmarks.arrivals import Arrival, to_request
from stable_audio_serve.core.catalog import ModelCard
from stable_audio_serve.core.errors import OverloadedError

if TYPE_CHECKING:
    from benchmarks.sides.servers import Side  # which imports torch: who asks over HTTP needs none

Audio = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a side says of its stages; `read` decodes the audio (C, S) float32."""

    stages_ms: Mapping[str, float]
    read: Callable[[], Audio]


class RefusedError(Exception):
    """A server had no room (429 or 503); `retry_after_s` is what it said."""

    def __init__(self, message: str, *, retry_after_s: float | None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Asker(Protocol):
    """A side, however it is reached."""

    async def ask(self, arrival: Arrival) -> Answer:
        """Returns at the last byte of the answer. Raises RefusedError, and RuntimeError for anything else but audio."""
        ...


class InProcess:
    """A side in this process."""

    def __init__(self, side: Side, card: ModelCard) -> None:
        self._side = side
        self._card = card

    async def ask(self, arrival: Arrival) -> Answer:
        try:
            result = await self._side.generate(to_request(arrival, self._card))
        except OverloadedError as error:
            raise RefusedError(error.message, retry_after_s=error.retry_after_s) from error
        timings = asdict(result.timings) if result.timings else {}
        stages_ms = {name.removesuffix("_ms"): ms for name, ms in timings.items() if isinstance(ms, float)}
        return Answer(stages_ms, lambda: result.audio[0])
