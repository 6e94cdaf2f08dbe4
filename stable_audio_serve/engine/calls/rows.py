"""The engine thread's state of one row. A row is one variation of a request: one clip that is being generated."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from stable_audio_serve.engine.calls.conditioning import HeldConditioning
from stable_audio_serve.engine.calls.request_state import Prompts, RequestState
from stable_audio_serve.engine.hardware.arena import HeldFrames
from stable_audio_serve.engine.hardware.device import Device, DeviceLostError, Moment
from stable_audio_serve.engine.scheduling.batching import Lane
from stable_audio_serve.engine.scheduling.scheduler import RowId, RowWork
from stable_audio_serve.engine.scheduling.windows import AudioAssembly, SourceEncoding
from stable_audio_serve.models.adapters.fold import Slot
from stable_audio_serve.models.protocol import RowPlan
from stable_audio_serve.models.windows import cut_windows
from stable_audio_serve.sampling.noise import NoiseSource
from stable_audio_serve.sampling.plan import Evaluation, SamplerPlan
from stable_audio_serve.sampling.update import StepNumbers

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
    prompts: Prompts
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
    def lane(self) -> Lane:
        """The size of the row's next evaluation: its number of network rows and latent frames."""
        return self.work.lane

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


def run_alone(row: Row, action: Callable[[Row], None], *, device: Device) -> Failures:
    """Call `action(row)`. Returns an empty list, or the row with the exception if `action` raises.

    Raises DeviceLostError if the device is lost.
    """
    try:
        action(row)
    except DeviceLostError:
        raise
    except Exception as error:  # noqa: BLE001 - the engine's edge
        device.require_usable(error)
        return [(row, error)]
    return []


def make_assembly(plan: RowPlan, *, hop: int, channels: int, is_fixed: bool, device: Device) -> AudioAssembly:
    """Return an AudioAssembly for a row. No window is decoded yet.

    With `is_fixed`, the audio is decoded in exactly the windows of `plan`, else in as few windows as possible.
    """
    spans = plan.decode_windows
    if plan.decode_rule is not None and not is_fixed:
        spans = tuple(cut_windows(spans[-1].stop, rule=plan.decode_rule))
    return AudioAssembly(
        spans,
        device=device,
        channels=channels,
        hop=hop,
        valid_frames=plan.valid_frames,
        output_samples=plan.output_samples,
    )


def _share_done(total: int, left: int) -> float:
    return 1.0 if total == 0 else 1.0 - left / total
