"""Prompts to embeddings: the host's tokens in one copy, then one call of the text encoder, which may be captured.

Knows no rows and keeps no embeddings.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stable_audio_serve.engine.call_shapes import GRAPH_ROWS
from stable_audio_serve.engine.device import Device
from stable_audio_serve.engine.graphs import CallMemory, Graphs, Kind
from stable_audio_serve.models.protocol import DiffusionModel, TextEmbedding, TokenModel


def captured_prompts(num_prompts: int) -> int:
    """Returns how many prompts the call has that is captured for these; 0: none is."""
    return GRAPH_ROWS[bisect_left(GRAPH_ROWS, num_prompts)] if num_prompts <= GRAPH_ROWS[-1] else 0


@dataclass(frozen=True, slots=True)
class TextShape:
    """A call over `prompts` prompts of T tokens each, whose embeddings are `width` wide."""

    prompts: int
    tokens: int
    width: int

    @property
    def kind(self) -> Kind:
        return "text"

    @property
    def size(self) -> int:
        return self.prompts * self.tokens

    @property
    def inputs(self) -> tuple[int, torch.dtype]:
        return 2 * self.size, torch.int64

    @property
    def num_outputs(self) -> int:
        return self.size * self.width

    def told(self, inputs: Tensor) -> Tensor:
        """Returns ids and mask (B, 2, T) as a view."""
        return inputs.view(self.prompts, 2, self.tokens)

    def embeddings(self, outputs: Tensor) -> Tensor:
        """Returns tokens (B, T, width) float32 as a view."""
        return outputs.view(self.prompts, self.tokens, self.width)


class TextCalls:
    """Calls of one model's text encoder. Used by the engine thread only."""

    def __init__(self, model: DiffusionModel, *, device: Device, graphs: Graphs) -> None:
        self._model = model
        self._device = device
        self._graphs = graphs

    def embed(self, prompts: Sequence[str]) -> list[TextEmbedding]:
        """Returns the prompts' embeddings, from one call."""
        model = self._model
        if not isinstance(model, TokenModel):
            return model.encode_text(prompts)
        tokens = model.tokenize(prompts)
        told, read = tokens.told, tokens.chars_read
        if self._device.can_capture and (num_prompts := captured_prompts(len(prompts))):
            shape = TextShape(num_prompts, *model.text_size)
            if captured := self._graphs.find(shape, self._run):
                buffer = self._device.host_buffer(shape.prompts, 2, shape.tokens, dtype=torch.int64)
                buffer[: len(told)] = told
                buffer[len(told) :] = 0  # prompts of padding
                there = shape.told(captured.memory.inputs)
                there.copy_(buffer, non_blocking=True)
                captured.replay()
                embeddings = shape.embeddings(captured.memory.outputs)
                return TextEmbedding.each(prompts, embeddings, mask=there[:, 1], chars_read=read)
        there = self._device.upload(told)
        return TextEmbedding.each(prompts, model.embed_tokens(there), mask=there[:, 1], chars_read=read)

    def _run(self, shape: TextShape, memory: CallMemory) -> None:
        assert isinstance(self._model, TokenModel)
        shape.embeddings(memory.outputs).copy_(self._model.embed_tokens(shape.told(memory.inputs)))
