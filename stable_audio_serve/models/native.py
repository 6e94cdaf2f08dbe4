"""What the models whose networks this project implements have in common: text encoding, the context of the
unconditional branch, and the choice of a denoiser call's token layout (padded or packed).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from stable_audio_serve.core.catalog import DecodePrecision
from stable_audio_serve.models.blocks import Layout, Packed, PackedSegments
from stable_audio_serve.models.blocks.fused import use_kernels
from stable_audio_serve.models.blocks.kernel_check import load_kernels
from stable_audio_serve.models.blocks.varlen import attend_packed
from stable_audio_serve.models.precision import decoder_products, stores_half
from stable_audio_serve.models.protocol import BranchConditioning, ModelSpec, StepBatch, TextEmbedding
from stable_audio_serve.models.switches import exact
from stable_audio_serve.models.text_encoder import TextEncoder
from stable_audio_serve.sampling.transfer import to_device

CONTEXT = "context"  # key in StepBatch.constants: the cross-attention keys and values of every layer


def packed_layout(batch: StepBatch, *, num_prefix: int) -> Layout | None:
    """Returns the layout of a packed batch, in which each row has `num_prefix` tokens before its frames.

    Returns None for a padded batch.
    """
    if batch.segments is not None:
        slots = batch.slots.get(CONTEXT)
        return PackedSegments(batch.segments, num_prefix=num_prefix, slots=slots, varlen=attend_packed)
    return Packed(batch.frames, batch.valid_frames, num_prefix=num_prefix) if batch.frames else None


def without_context(branch: BranchConditioning) -> BranchConditioning:
    """Returns the unconditional branch: the same row with all context tokens zero."""
    return replace(branch, constants={name: value for name, value in branch.constants.items() if name != CONTEXT})


def with_context(branch: BranchConditioning, context: Tensor) -> BranchConditioning:
    """Returns `branch` with the cross-attention keys and values `context` of another row, without a batch axis."""
    return replace(branch, constants={**branch.constants, CONTEXT: context})


class NativeModel:
    """Base class of a model: implements text encoding, `spec` and `device`. Public methods run without gradients."""

    denoiser: nn.Module
    autoencoder: nn.Module

    def __init__(
        self,
        text: TextEncoder,
        prompt: nn.Module,
        *,
        spec: ModelSpec,
        device: torch.device,
        decode_precision: DecodePrecision,
    ) -> None:
        """`prompt` converts the output of `text` to embeddings and sets the embeddings of padding tokens."""
        self.text = text
        self.prompt = prompt
        self._spec = replace(spec, has_fused_kernels=load_kernels(device, spec.dtype) is not None)
        self._device = device
        self._decode_precision: DecodePrecision = decode_precision
        self._products = decoder_products(decode_precision, device)

    def use_features(self, *, fast_decoding: bool, fused_kernels: bool) -> None:
        """See `SwitchableModel`. A decoder whose weights are stored in half precision always decodes in it."""
        if not stores_half(self._decode_precision, self._device):
            precision = self._decode_precision if fast_decoding else "float32"
            self._products = decoder_products(precision, self._device)
        kernels = load_kernels(self._device, self._spec.dtype) if fused_kernels else None
        for network in (self.denoiser, self.autoencoder):
            use_kernels(network, kernels)

    @property
    def spec(self) -> ModelSpec:
        return self._spec

    @property
    def device(self) -> torch.device:
        return self._device

    @torch.inference_mode()
    @exact
    def encode_text(self, prompts: Sequence[str]) -> list[TextEmbedding]:
        """Returns each prompt's embedding (tokens, width) float32 and its mask of real tokens.

        A padding token's embedding is a learned vector (Stable Audio 3) or zero (Stable Audio Open).
        """
        tokens = self.text.tokenize(prompts)
        ids_and_mask = to_device(tokens.ids_and_mask, self._device)
        ids, mask = ids_and_mask.unbind(1)
        embeddings: Tensor = self.prompt(self.text.encode(ids, mask), mask.bool())
        return TextEmbedding.each(prompts, embeddings, mask=mask, chars_read=tokens.chars_read)
