"""The state of one request. The caller's event loop and the engine thread share it: it has the reply, the cancellation
and the timings. `Inbox` passes requests from callers to the engine thread.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from math import inf
from typing import Literal, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from stable_audio_serve.core.errors import UNAVAILABLE, DeadlineExceededError, ModelUnavailableError, StartTimeoutError
from stable_audio_serve.core.generation import (
    GenerationRequest,
    GenerationResult,
    Progress,
    ProgressCallback,
    StageTimings,
)
from stable_audio_serve.engine.adapters import HeldSlots
from stable_audio_serve.engine.calls.conditioning import HeldConditioning
from stable_audio_serve.engine.scheduling.scheduler import RowId, RowWork
from stable_audio_serve.engine.scheduling.windows import SourceEncoding
from stable_audio_serve.models.protocol import RowPlan, TextEmbedding
from stable_audio_serve.sampling.noise import NoiseSource


class Inbox:
    """A queue that passes submitted requests from callers to the engine thread.

    When the engine thread stops reading, it closes the inbox. A closed inbox accepts no more requests.
    """

    def __init__(self) -> None:
        self._requests: deque[RequestState] = deque()
        self._lock = threading.Lock()
        self._changed = threading.Event()
        self._closed = False

    def put(self, request: RequestState) -> None:
        """Add a request. Raises ModelUnavailableError if the inbox is closed."""
        with self._lock:
            if self._closed:
                raise ModelUnavailableError(UNAVAILABLE)
            self._requests.append(request)
        self._changed.set()

    def wake(self) -> None:
        """Make `wait` return at once. Called after a cancellation, and to stop the engine thread."""
        self._changed.set()

    def wait(self, timeout_s: float) -> None:
        """Block until a request arrives or `wake` is called, at most `timeout_s`."""
        self._changed.wait(timeout_s)

    def take(self) -> list[RequestState]:
        """Remove and return all requests in the queue."""
        self._changed.clear()
        with self._lock:
            taken = list(self._requests)
            self._requests.clear()
        return taken

    def close(self) -> list[RequestState]:
        """Accept no more requests. Returns the requests that are still in the queue."""
        with self._lock:
            self._closed = True
        return self.take()


Message = TypeVar("Message")
TimedStage = Literal["queue", "text", "source", "denoise", "stalled", "decode"]


class Reply:
    """Sends results, errors and progress to the caller's event loop. Thread-safe."""

    def __init__(self, on_progress: ProgressCallback | None) -> None:
        """Must be called within the event loop to which replies are sent."""
        self.loop = asyncio.get_running_loop()
        self._on_progress = on_progress
        self.future: asyncio.Future[GenerationResult] = self.loop.create_future()

    @property
    def wants_progress(self) -> bool:
        return self._on_progress is not None

    def resolve(self, result: GenerationResult) -> None:
        """Make the caller's `await` return the result. Does nothing if the caller no longer waits."""
        self._post(self.future.set_result, result)

    def fail(self, error: Exception) -> None:
        """Make the caller's `await` raise `error`. Does nothing if the caller no longer waits."""
        self._post(self.future.set_exception, error)

    def report(self, progress: Progress) -> None:
        """Call the caller's progress callback on the caller's event loop."""
        if self._on_progress is not None:
            self._post(self._on_progress, progress)

    def _post(self, action: Callable[[Message], object], message: Message) -> None:
        with suppress(RuntimeError):  # raised if the event loop is closed
            self.loop.call_soon_threadsafe(self._deliver, action, message)

    def _deliver(self, action: Callable[[Message], object], message: Message) -> None:
        if not self.future.done():
            action(message)


class StageClock:
    """Measures how much wall time a request spends in each stage. Every moment counts towards exactly one stage."""

    def __init__(self, started_at: float) -> None:
        self._started_at = self._last_at = started_at
        self._seconds: dict[TimedStage, float] = {}

    def mark(self, stage: TimedStage, now: float) -> None:
        """Count the time from the previous `mark` until `now` towards `stage`."""
        self._seconds[stage] = self._seconds.get(stage, 0.0) + now - self._last_at
        self._last_at = now

    def timings(self) -> StageTimings:
        """Return the time spent in each stage until the last `mark`."""
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


def deadline_error(request: GenerationRequest) -> DeadlineExceededError:
    """Return the error for a request that did not finish in time."""
    message = f"the request did not finish within its {request.deadline_s:g} s"
    return DeadlineExceededError(message, field="deadline_s")


def start_timeout_error(request: GenerationRequest) -> StartTimeoutError:
    """Return the error for a request that did not start in time."""
    return StartTimeoutError(f"the request did not start within its {request.start_within_s:g} s")


@dataclass(frozen=True, slots=True)
class Prompts:
    """The embeddings of a prompt and the negative prompt; `negative` is None if no evaluation uses it."""

    prompt: TextEmbedding
    negative: TextEmbedding | None


@dataclass(slots=True)
class SharedParts:
    """Values that all variations (rows) of a request share. The first row that needs a value computes it."""

    prompts: dict[str, Prompts] = field(default_factory=dict)  # key: the prompt
    # Key: init or inpaint. Empty if the encoder draws noise, because each row then has its own encoding.
    sources: dict[str, SourceEncoding] = field(default_factory=dict)
    # Key: the prompt. Empty if the conditioning depends on the noise of one row.
    conditioning: dict[str, HeldConditioning] = field(default_factory=dict)
    # True: the conditioning is kept for later rows until `release`. False: it is freed when no row in progress uses it.
    keeps_conditioning: bool = False

    def release(self) -> None:
        """Release the conditioning that is kept for later rows of the request."""
        if self.keeps_conditioning:
            for held in self.conditioning.values():
                held.free()
        self.conditioning.clear()


class RequestRow(Protocol):
    """The attributes of `engine.calls.rows.Row` that a request reads."""

    id: RowId
    plan: RowPlan
    work: RowWork

    @property
    def fraction(self) -> float:
        """How much of the row's work is done, 0..1; never decreases."""
        ...

    @property
    def steps_done(self) -> int:
        """The number of finished sampler steps."""
        ...

    @property
    def is_conditioned(self) -> bool:
        """Whether the row can run its first step or has run it."""
        ...


class RequestState:
    """One accepted request. Any thread may call `cancel`.

    Only the engine thread uses `clock` and the fields that `__init__` sets after `clock`.
    """

    def __init__(
        self,
        request_id: int,
        request: GenerationRequest,
        *,
        plans: Sequence[tuple[RowPlan, RowWork]],
        reply: Reply,
        noise_factory: Callable[[int], NoiseSource],
        submitted_at: float,
        slots: HeldSlots | None = None,
    ) -> None:
        self.id = request_id
        self.request = request
        self.plans = plans
        self.reply = reply
        self.noise_factory = noise_factory
        self.submitted_at = submitted_at
        self.slots = slots or HeldSlots()
        self.deadline_at = inf if request.deadline_s is None else submitted_at + request.deadline_s
        # When the request ends unless it has started; once it has started, `deadline_at`.
        self.end_at = self.deadline_at
        if request.start_within_s is not None:
            self.end_at = min(self.deadline_at, submitted_at + request.start_within_s)
        self._is_cancelled = False
        self.clock = StageClock(submitted_at)
        self.rows: list[RequestRow] = []
        self.audio: dict[int, npt.NDArray[np.float32]] = {}
        self.shared = SharedParts()
        self.last_position: int | None = None
        self.is_started = False

    def cancel(self) -> None:
        """End the request at the next step boundary."""
        self._is_cancelled = True

    @property
    def is_abandoned(self) -> bool:
        """Whether the request was cancelled or its caller's event loop is closed."""
        return self._is_cancelled or self.reply.loop.is_closed()

    def start(self) -> None:
        """Called when the first of the request's rows is picked."""
        self.is_started = True
        self.end_at = self.deadline_at

    def progress(self, queue_position: int | None) -> Progress:
        """Return the progress of all variations together. From one call to the next, stage and fraction never go back.

        `queue_position` is None once the request has started.
        """
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
