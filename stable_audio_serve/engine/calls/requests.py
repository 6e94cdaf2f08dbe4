"""The state of requests and of their rows. A row is one variation of a request: one clip that is being generated.

A request's reply, cancellation and timings are shared by the caller's event loop and the engine thread. Everything else
is used by the engine thread only.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from contextlib import suppress
from dataclasses import dataclass, field
from math import inf
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stable_audio_serve.core.errors import DeadlineExceededError
from stable_audio_serve.core.generation import (
    GenerationRequest,
    GenerationResult,
    Progress,
    ProgressCallback,
    StageTimings,
)
from stable_audio_serve.engine.adapters import HeldSlots
from stable_audio_serve.engine.calls.conditioning import HeldConditioning
from stable_audio_serve.engine.hardware.arena import HeldFrames
from stable_audio_serve.engine.hardware.device import Moment
from stable_audio_serve.engine.scheduling.scheduler import RowId, RowWork
from stable_audio_serve.engine.scheduling.windows import AudioAssembly, SourceEncoding
from stable_audio_serve.models.adapters.fold import Slot
from stable_audio_serve.models.protocol import RowPlan, TextEmbedding
from stable_audio_serve.sampling.noise import NoiseSource
from stable_audio_serve.sampling.plan import Evaluation, SamplerPlan
from stable_audio_serve.sampling.update import StepNumbers

Message = TypeVar("Message")
TimedStage = Literal["queue", "text", "source", "denoise", "decode"]


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
        ms = {f"{stage}_ms": seconds * 1000.0 for stage, seconds in self._seconds.items()}
        return StageTimings(**ms, total_ms=(self._last_at - self._started_at) * 1000.0)


def deadline_error(request: GenerationRequest) -> DeadlineExceededError:
    """Return the error for a request that did not finish in time."""
    message = f"the request did not finish within its {request.deadline_s:g} s"
    return DeadlineExceededError(message, field="deadline_s")


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
        slots: HeldSlots = HeldSlots(),
    ) -> None:
        self.id = request_id
        self.request = request
        self.plans = plans
        self.reply = reply
        self.noise_factory = noise_factory
        self.submitted_at = submitted_at
        self.slots = slots
        self.deadline_at = inf if request.deadline_s is None else submitted_at + request.deadline_s
        # When the request ends unless it has started; once it has started, `deadline_at`.
        self.end_at = self.deadline_at
        if request.start_within_s is not None:
            self.end_at = min(self.deadline_at, submitted_at + request.start_within_s)
        self._is_cancelled = False
        self.clock = StageClock(submitted_at)
        self.rows: list[Row] = []
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


# The progress that is reported when encoding ends and when denoising ends. The values are rough; since they are
# constants, progress never decreases.
_ENCODED, _DENOISED = 0.05, 0.9
# With one, the next draw began when its step could have been queued. On an H200, small's steps of 120 s (4.3 ms) were
# 3.7 ms apart on the host, of which a draw took 1.9 ms.
_DRAWS_AHEAD = 2


class RowNoise:
    """The noise that the sampler uses for one row. The encoder and the decoder draw their noise from `source` directly.

    Noise is drawn on a thread of `noise_pool`, `_DRAWS_AHEAD` evaluations ahead, so that the device need not wait for
    it. The pool must start its tasks in order, but may run several at a time. Nothing is drawn after the last
    evaluation that uses noise. If an edit keeps frames of the source, the noise for these frames comes from a separate
    random generator and does not change the other draws.
    """

    def __init__(self, source: NoiseSource, plan: SamplerPlan, *, shape: tuple[int, int], noise_pool: Executor) -> None:
        """Start drawing the initial noise. `shape` is the row's latent shape (channels, frames)."""
        self.source = source
        self._shape = shape
        self._noise_pool = noise_pool
        drawing = [any(e.c) for e in plan.evaluations if e.draws_noise]
        self._num_left = max((i + 1 for i, weighs in enumerate(drawing) if weighs), default=0)
        self._initial = noise_pool.submit(source.initial, shape)
        self._kept = noise_pool.submit(self._source_kept) if plan.start_blend else None
        self._ahead: deque[Future[Tensor]] = deque()
        self._last = self._initial
        self._draw(1)  # only one, so that many new rows get their initial noise soon

    def initial(self) -> Tensor:
        """Return the initial noise (channels, frames) float32 on the CPU; waits until it is drawn."""
        drawn = self._initial.result()
        self._draw_ahead()
        return drawn

    def kept(self) -> Tensor:
        """Return the noise for the frames of the source that an edit keeps: (channels, frames) float32 on the CPU.

        Raises RuntimeError if the plan keeps no frames.
        """
        if self._kept is None:
            raise RuntimeError("a row that keeps no frames asked for their noise")
        return self._kept.result()

    def current(self) -> Tensor | None:
        """Return the current evaluation's noise (channels, frames) float32 on the CPU; None if no more noise is used.

        Returns the same tensor until `advance` is called, so that a failed step can run again with it.
        """
        return self._ahead[0].result() if self._ahead else None

    def advance(self) -> None:
        """Drop the noise of the current evaluation and start drawing the noise of later ones."""
        if self._ahead:
            self._ahead.popleft()
        self._draw_ahead()

    def cancel(self) -> None:
        """Stop drawing because the row ended."""
        self._num_left = 0
        for draw in self._ahead:
            draw.cancel()

    def _draw_ahead(self) -> None:
        self._draw(_DRAWS_AHEAD - len(self._ahead))

    def _draw(self, count: int) -> None:
        for _ in range(min(count, self._num_left)):
            self._num_left -= 1
            self._last = self._noise_pool.submit(self._source_step, self._last)
            self._ahead.append(self._last)

    def _source_kept(self) -> Tensor:
        return self.source.window("kept", 0, shape=self._shape, frame_axis=1, device=torch.device("cpu"))

    def _source_step(self, previous: Future[Tensor]) -> Tensor:
        previous.result()  # of the same generator; its task has started before this one
        return self.source.step(self._shape)


@dataclass(frozen=True, slots=True)
class Waiting:
    """The row has not started or has ended; it holds no device memory."""


@dataclass(frozen=True, slots=True)
class Encoding:
    """The row's noise is being drawn, and its source audio is being encoded.

    `sources` may have the keys init and inpaint.
    """

    noise: RowNoise
    ready: Moment  # when the device has encoded the prompts and all windows that are queued so far
    sources: dict[str, SourceEncoding] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Stepping:
    """The row is being denoised.

    `held` is the device memory of its registers (latents), followed by the mask, source and noise of kept frames, if
    any.
    """

    noise: RowNoise
    conditioning: HeldConditioning
    numbers: Sequence[StepNumbers]  # one per evaluation
    held: HeldFrames
    slot: Slot | None = None  # the adapters that `conditioning` was computed with
    inpaint: Tensor | None = None  # the source's latents, if `conditioning` will be computed again for other adapters


@dataclass(frozen=True, slots=True)
class Decoding:
    """The row is denoised, and its `latents` (channels, frames) float32 are being decoded on the device. The decoder
    draws its noise from `noise`.
    """

    noise: NoiseSource
    latents: Tensor
    audio: AudioAssembly
    ready: Moment  # when the device has computed `latents` and decoded all windows that are queued so far


RowPhase = Waiting | Encoding | Stepping | Decoding
OnePhase = TypeVar("OnePhase", Waiting, Encoding, Stepping, Decoding)


class Row:
    """The mutable state of one row, that is, of one variation of a request."""

    def __init__(self, row_id: RowId, request: RequestState, *, index: int, plan: RowPlan, work: RowWork) -> None:
        """`index` is the number of the variation within the request, from 0."""
        self.id = row_id
        self.request = request
        self.index = index
        self.plan = plan
        self.work = work
        self.phase: RowPhase = Waiting()
        self._encode_total = sum(work.encode_left)
        self._decode_total = sum(work.decode_left)

    def in_phase(self, kind: type[OnePhase]) -> OnePhase:
        """Return `self.phase`, which must be of type `kind`. Raises RuntimeError if it is not."""
        if not isinstance(self.phase, kind):
            raise RuntimeError(f"a row is {type(self.phase).__name__}, not {kind.__name__}")
        return self.phase

    @property
    def evaluation(self) -> Evaluation:
        """The evaluation that runs next."""
        return self.plan.sampler.evaluations[self.work.num_done]

    @property
    def slot(self) -> Slot | None:
        """The folded adapters that apply to the row's next evaluation; None if there are none."""
        slots = self.request.slots.by_evaluation
        return slots[self.work.num_done] if slots else None

    @property
    def is_conditioned(self) -> bool:
        """Whether the row can run its first step or has run it."""
        return isinstance(self.phase, Stepping) or self.work.num_done > 0

    @property
    def steps_done(self) -> int:
        """The number of finished sampler steps, as reported to clients."""
        return bisect_right(self.plan.sampler.step_ends, self.work.num_done)

    @property
    def fraction(self) -> float:
        """How much of the row's work is done, 0..1; never decreases."""
        encoded = _share_done(self._encode_total, sum(self.work.encode_left))
        denoised = self.work.num_done / max(len(self.work.branches), 1)
        decoded = _share_done(self._decode_total, sum(self.work.decode_left))
        return _ENCODED * encoded + (_DENOISED - _ENCODED) * denoised + (1.0 - _DENOISED) * decoded

    def release(self) -> None:
        """Free the row's tensors and stop drawing noise for the row."""
        if isinstance(self.phase, Encoding | Stepping):
            self.phase.noise.cancel()
        if isinstance(self.phase, Stepping):
            self.phase.held.free()
            self.phase.conditioning.free()
        self.phase = Waiting()


Failures = list[tuple[Row, Exception]]


def _share_done(total: int, left: int) -> float:
    return 1.0 if total == 0 else 1.0 - left / total
