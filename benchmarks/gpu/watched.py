"""A model and its device that tell a `StepWatch` of their work; otherwise they are themselves.

A step that was captured runs without the model's code, so then it is the device that tells.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from benchmarks.gpu.tracing import StepWatch
from stable_audio_serve.core.clock import SystemClock
from stable_audio_serve.engine.hardware.device import Device, open_device
from stable_audio_serve.models.forwarding import ForwardingModel
from stable_audio_serve.models.protocol import (
    DecodeWindow,
    DiffusionModel,
    EncodeWindow,
    RowConditioning,
    RowPlan,
    StepBatch,
    TextEmbedding,
)


class WatchedModel(ForwardingModel):
    """Tells of steps and of what else is done between them."""

    def __init__(self, model: DiffusionModel, watch: StepWatch) -> None:
        super().__init__(model)
        self._watch = watch

    def encode_text(self, prompts: Sequence[str]) -> list[TextEmbedding]:
        self._watch.something_else()
        return super().encode_text(prompts)

    def encode_audio(self, windows: Sequence[EncodeWindow]) -> list[Tensor]:
        self._watch.something_else()
        return super().encode_audio(windows)

    def condition(
        self, plan: RowPlan, *, prompt: TextEmbedding, negative: TextEmbedding | None, inpaint_latents: Tensor | None
    ) -> RowConditioning:
        self._watch.something_else()
        return super().condition(plan, prompt=prompt, negative=negative, inpaint_latents=inpaint_latents)

    def denoise(self, batch: StepBatch) -> Tensor:
        self._watch.step_begins()
        output = super().denoise(batch)
        self._watch.step_ends()
        return output

    def decode(self, windows: Sequence[DecodeWindow]) -> list[Tensor]:
        self._watch.something_else()
        return super().decode(windows)


def watch_device(model: DiffusionModel, watch: StepWatch, *, captures_calls: bool = True) -> Device:
    """Returns the model's device for an engine around a `WatchedModel`; it captures nothing unless told to."""
    device: Any = open_device(model.device, clock=SystemClock())
    device.can_capture = captures_calls and device.can_capture
    capture = device.capture

    def capture_watched(run: Callable[[], None]) -> Callable[[], None]:
        watch.something_else()
        with watch.looking_away() as seen:
            replay = capture(run)

        def replay_watched() -> None:
            if not seen.has_step:
                watch.something_else()
                replay()
                return
            watch.step_begins()
            with watch.looking_away():
                replay()
            watch.step_ends()

        return replay_watched

    device.capture = capture_watched
    watched: Device = device
    return watched
