"""A base class for wrappers around a model. A wrapper changes or observes some methods and forwards the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from stable_audio_serve.core.generation import GenerationRequest
from stable_audio_serve.models.protocol import (
    AdaptableModel,
    DecodeWindow,
    DiffusionModel,
    EncodeWindow,
    ModelSpec,
    RowConditioning,
    RowPlan,
    StepBatch,
    TextEmbedding,
)


class ForwardingModel:
    """Implements DiffusionModel by forwarding every call to another model. Subclasses override what they change."""

    def __init__(self, model: DiffusionModel) -> None:
        self._model = model

    @property
    def spec(self) -> ModelSpec:
        return self._model.spec

    @property
    def device(self) -> torch.device:
        return self._model.device

    @property
    def adaptable(self) -> Mapping[str, nn.Module]:
        """The networks that adapters can change; none if the model is not adaptable."""
        return self._model.adaptable if isinstance(self._model, AdaptableModel) else {}

    def runs_in_steps(self, layer: str) -> bool:
        """Whether `denoise` runs the layer that adapter files name `layer`."""
        return isinstance(self._model, AdaptableModel) and self._model.runs_in_steps(layer)

    def plan(self, request: GenerationRequest, *, frames: int | None = None) -> tuple[RowPlan, ...]:
        return self._model.plan(request, frames=frames)

    def encode_text(self, prompts: Sequence[str]) -> list[TextEmbedding]:
        return self._model.encode_text(prompts)

    def encode_audio(self, windows: Sequence[EncodeWindow]) -> list[Tensor]:
        return self._model.encode_audio(windows)

    def condition(
        self, plan: RowPlan, *, prompt: TextEmbedding, negative: TextEmbedding | None, inpaint_latents: Tensor | None
    ) -> RowConditioning:
        return self._model.condition(plan, prompt=prompt, negative=negative, inpaint_latents=inpaint_latents)

    def denoise(self, batch: StepBatch) -> Tensor:
        return self._model.denoise(batch)

    def decode(self, windows: Sequence[DecodeWindow]) -> list[Tensor]:
        return self._model.decode(windows)
