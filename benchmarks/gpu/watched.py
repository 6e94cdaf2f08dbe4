"""A model that tells a `StepWatch` of its calls; otherwise it is the model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.gpu.tracing import StepWatch
from stable_audio_serve.core.generation import GenerationRequest
from stable_audio_serve.models.protocol import (
    DecodeWindow,
    DiffusionModel,
    EncodeWindow,
    ModelSpec,
    RowConditioning,
    RowPlan,
    StepBatch,
    TextEmbedding,
)


class WatchedModel:
    """Implements DiffusionModel around another."""

    def __init__(self, model: DiffusionModel, watch: StepWatch) -> None:
        self._model = model
        self._watch = watch

    @property
    def spec(self) -> ModelSpec:
        return self._model.spec

    @property
    def device(self) -> torch.device:
        return self._model.device

    def plan(self, request: GenerationRequest, *, frames: int | None = None) -> tuple[RowPlan, ...]:
        return self._model.plan(request, frames=frames)

    def encode_text(self, prompts: Sequence[str]) -> list[TextEmbedding]:
        self._watch.something_else()
        return self._model.encode_text(prompts)

    def encode_audio(self, windows: Sequence[EncodeWindow]) -> list[Tensor]:
        self._watch.something_else()
        return self._model.encode_audio(windows)

    def condition(
        self, plan: RowPlan, *, prompt: TextEmbedding, negative: TextEmbedding | None, inpaint_latents: Tensor | None
    ) -> RowConditioning:
        self._watch.something_else()
        return self._model.condition(plan, prompt=prompt, negative=negative, inpaint_latents=inpaint_latents)

    def denoise(self, batch: StepBatch) -> Tensor:
        self._watch.step_begins()
        output = self._model.denoise(batch)
        self._watch.step_ends()
        return output

    def decode(self, windows: Sequence[DecodeWindow]) -> list[Tensor]:
        self._watch.something_else()
        return self._model.decode(windows)
