"""A model that tells a `StepWatch` of its calls; otherwise it is the model."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from benchmarks.gpu.tracing import StepWatch
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
