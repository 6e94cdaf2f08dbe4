"""One request between the caller's event loop and the engine thread: its reply, its cancellation, its timings."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Literal, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from stable_audio_serve.core.errors import DeadlineExceededError, StartTimeoutError
from stable_audio_serve.core.generation import (
    GenerationRequest,
    GenerationResult,
    Progress,
    ProgressCallback,
    StageTimings,
)
from stable_audio_serve.engine.scheduler import RowId
from stable_audio_serve.engine.windows import SourceEncoding
from stable_audio_serve.engine.work import RowWork
from stable_audio_serve.models.protocol import RowConditioning, RowPlan, TextEmbedding
from stable_audio_serve.sampling.noise import NoiseSource

Message = TypeVar("Message")
TimedStage = Literal["queue", "text", "source", "denoise", "stalled", "decode"]


class Reply:
    """The way back to the caller: everything is posted to the event loop that asked. Usable from any thread."""

    def __init__(self, on_progress: ProgressCallback | None) -> None:
        """Must be called on the caller's event loop."""
        self._loop = asyncio.get_running_loop()
        self._on_progress = on_progress
        self.future: asyncio.Future[GenerationResult] = self._loop.create_future()

    @property
    def is_abandoned(self) -> bool:
        """Whether nobody waits any more because the event loop is closed."""
        return self._loop.is_closed()

    @property
    def wants_progress(self) -> bool:
        """Whether anybody listens."""
        return self._on_progress is not None

    def resolve(self, result: GenerationResult) -> None:
        """Hand the result over, unless the caller left."""
        self._post(self.future.set_result, result)

    def fail(self, error: Exception) -> None:
        """Raise `error` in the caller, unless it left."""
        self._post(self.future.set_exception, error)

    def report(self, progress: Progress) -> None:
        """Call the caller's callback on its own loop."""
        if self._on_progress is not None:
            self._post(self._on_progress, progress)

    def _post(self, action: Callable[[Message], object], message: Message) -> None:
        with suppress(RuntimeError):  # the loop was closed
            self._loop.call_soon_threadsafe(self._deliver, action, message)

    def _deliver(self, action: Callable[[Message], object], message: Message) -> None:
        if not self.future.done():
            action(message)


class StageClock:
    """Splits a request's wall time into stages without gaps: each mark gives the time since the last to one stage."""

    def __init__(self, started_at: float) -> None:
        self._started_at = self._last_at = started_at
        self._seconds: dict[TimedStage, float] = {}

    def mark(self, stage: TimedStage, now: float) -> None:
        """What passed since the last mark belongs to `stage`."""
        self._seconds[stage] = self._seconds.get(stage, 0.0) + now - self._last_at
        self._last_at = now

    def timings(self) -> StageTimings:
        """The stages up to the last mark."""
        ms = {stage: seconds * 1000.0 for stage, seconds in self._seconds.items()}
        stalled_ms = ms.get("stalled", 0.0)
        return StageTimings(
            queue_ms=ms.get("queue", 0.0),
            text_ms=ms.get("text", 0.0),
            source_ms=ms.get("source", 0.0),
            denoise_ms=ms.get("denoise", 0.0) + stalled_ms,
            stalled_ms=stalled_ms,
            decode_ms=ms.get("decode", 0.0),
            total_ms=(self._last_at - self._started_at) * 1000.0,
        )


def late(request: GenerationRequest) -> DeadlineExceededError:
    """What a caller is told whose time budget ran out."""
    message = f"the request did not finish within its {request.deadline_s:g} s"
    return DeadlineExceededError(message, field="deadline_s")


def late_start(request: GenerationRequest) -> StartTimeoutError:
    """What a caller is told whose request waited longer than it wanted to."""
    return StartTimeoutError(f"the request did not start within its {request.start_within_s:g} s")


class RequestRow(Protocol):
    """What a request needs to know of each of its rows; `engine.rows.Row` is one."""

    id: RowId
    plan: RowPlan
    work: RowWork

    @property
    def fraction(self) -> float:
        """0..1, never falling."""
        ...

    @property
    def steps_done(self) -> int:
        """Finished steps of the sampler."""
        ...

    @property
    def is_conditioned(self) -> bool:
        """Whether the first step can run or has run."""
        ...


class RequestState:
    """One accepted request. Its fields from `clock` on belong to the engine thread; `cancel` may come from any."""

    def __init__(
        self,
        request_id: int,
        request: GenerationRequest,
        *,
        plans: Sequence[tuple[RowPlan, RowWork]],
        reply: Reply,
        noise_factory: Callable[[int], NoiseSource],
        submitted_at: float,
    ) -> None:
        self.id = request_id
        self.request = request
        self.plans = plans
        self.reply = reply
        self.noise_factory = noise_factory
        self.submitted_at = submitted_at
        self.deadline_at = None if request.deadline_s is None else submitted_at + request.deadline_s
        self.start_by = None if request.start_within_s is None else submitted_at + request.start_within_s
        self._cancelled = False
        self.clock = StageClock(submitted_at)
        self.rows: list[RequestRow] = []
        self.audio: dict[int, npt.NDArray[np.float32]] = {}
        self.sources: dict[str, SourceEncoding] = {}  # encodings that all rows share
        self.prompt: TextEmbedding | None = None
        self.negative: TextEmbedding | None = None
        self.conditioning: RowConditioning | None = None  # when all rows share it
        self.last_position: int | None = None
        self.is_started = False

    def cancel(self) -> None:
        """Ask for the request's end at the next step boundary."""
        self._cancelled = True

    @property
    def is_abandoned(self) -> bool:
        """Whether nobody waits for the result."""
        return self._cancelled or self.reply.is_abandoned

    def progress(self, queue_position: int | None) -> Progress:
        """How far all variations are together; stage and fraction never go back."""
        rows = self.rows
        fraction = sum(row.fraction for row in rows) / len(rows)
        steps_total = sum(len(row.plan.sampler.step_ends) for row in rows)
        steps_done = sum(row.steps_done for row in rows)
        if queue_position is not None:
            return Progress("queued", 0.0, 0, steps_total, queue_position)
        if steps_done == steps_total:
            return Progress("decoding", fraction, steps_done, steps_total)
        denoising = any(row.is_conditioned for row in rows)
        return Progress("denoising" if denoising else "encoding", fraction, steps_done, steps_total)
