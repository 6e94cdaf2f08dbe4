"""What the models whose networks this project implements have in common: text encoding, the conditioning of rows, and
the calls of the denoiser.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from stable_audio_serve.core.catalog import DecodePrecision
from stable_audio_serve.models.blocks.attention import name_kernels
from stable_audio_serve.models.blocks.fused import use_kernels
from stable_audio_serve.models.blocks.kernel_check import load_kernels
from stable_audio_serve.models.blocks.layouts import Layout
from stable_audio_serve.models.blocks.packed import Packed
from stable_audio_serve.models.blocks.packed_segments import PackedSegments
from stable_audio_serve.models.blocks.varlen import attend_packed, has_varlen
from stable_audio_serve.models.conditioners import ConditionersConfig, NumberConditioner, PromptConditioner
from stable_audio_serve.models.native_denoiser import DenoiserConditioning, NativeDenoiser
from stable_audio_serve.models.onednn import use_onednn
from stable_audio_serve.models.precision import decoder_products, store_half, stores_half
from stable_audio_serve.models.protocol import (
    BranchConditioning,
    ModelSpec,
    RowConditioning,
    RowPlan,
    StepBatch,
    TextEmbedding,
)
from stable_audio_serve.models.segments import Segments
from stable_audio_serve.models.switches import exact
from stable_audio_serve.models.text_encoder import TextEncoder
from stable_audio_serve.models.weight_sizes import DENOISER_KEYS
from stable_audio_serve.sampling.transfer import to_device

# Keys in StepBatch.constants. The context has the cross-attention keys and values of every layer.
CONTEXT, _GLOBAL, _LOCAL = "context", "global", "local"
AUTOENCODER_KEYS = "pretransform.model."  # prefix of the autoencoder's keys in the weight file

DenoiserT = TypeVar("DenoiserT", bound=NativeDenoiser)
AutoencoderT = TypeVar("AutoencoderT", bound=nn.Module)


@dataclass(frozen=True)
class Components(Generic[DenoiserT, AutoencoderT]):
    """The networks of one checkpoint, loaded and on their device. `numbers` has number conditioners by their id."""

    text: TextEncoder
    prompt: PromptConditioner
    numbers: dict[str, NumberConditioner]
    denoiser: DenoiserT
    autoencoder: AutoencoderT

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """Returns all networks, including the text encoder."""
        return (self.text.encoder, self.prompt, *self.numbers.values(), self.denoiser, self.autoencoder)


def checkpoint_modules(components: Components[Any, Any], conditioners: ConditionersConfig) -> dict[str, nn.Module]:
    """Returns the networks by the prefix of their keys in the weight file, for reading and writing weight files."""
    return {
        f"conditioner.conditioners.{conditioners.prompt.id}.": components.prompt,
        **{f"conditioner.conditioners.{id_}.": number for id_, number in components.numbers.items()},
        DENOISER_KEYS: components.denoiser,
        AUTOENCODER_KEYS: components.autoencoder,
    }


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


class NativeModel(ABC, Generic[DenoiserT, AutoencoderT]):
    """Base class of a model. Public methods run without gradients."""

    def __init__(
        self,
        components: Components[DenoiserT, AutoencoderT],
        *,
        conditioners: ConditionersConfig,
        spec: ModelSpec,
        device: torch.device,
        decode_precision: DecodePrecision,
    ) -> None:
        """`components` are prepared for inference: values that are derived from weights are computed once.

        If `decode_precision` is "half" on a CPU, the decoder's matrices and kernels are stored in half precision.
        """
        autoencoder: Any = components.autoencoder  # its class has more attributes than nn.Module
        autoencoder.resolve()
        if device.type == "cuda":
            components.denoiser.resolve()
        if stores_half(decode_precision, device):
            store_half(autoencoder.decoder, device)
        for network in components.modules:
            use_onednn(network)
        self.text = components.text
        self.prompt = components.prompt
        self.numbers = components.numbers
        self.denoiser = components.denoiser
        self.autoencoder = components.autoencoder
        self._conditioners = conditioners
        dtype, shape = self.denoiser.dtype, self.denoiser.config
        num_heads, head_width = shape.num_heads, shape.head_width
        self._spec = replace(
            spec,
            packs_segments=has_varlen(
                device, dtype, num_heads=num_heads, num_key_heads=shape.num_key_heads, head_width=head_width
            ),
            attention=name_kernels(device, dtype, num_heads=num_heads, head_width=head_width),
            num_prefix=shape.num_prefix,
            dtype=dtype,
        )
        self._device = device
        self._decode_precision: DecodePrecision = decode_precision
        self._products = decoder_products(decode_precision, device)

    def use_features(self, *, fast_decoding: bool, fused_kernels: bool) -> None:
        """See `SwitchableModel`. A decoder whose weights are stored in half precision always decodes in it."""
        if not stores_half(self._decode_precision, self._device):
            precision = self._decode_precision if fast_decoding else "float32"
            self._products = decoder_products(precision, self._device)
        is_fused = fused_kernels and not self._spec.is_compiled
        kernels = load_kernels(self._device, self._spec.dtype) if is_fused else None
        for network in (self.denoiser, self.autoencoder):
            use_kernels(network, kernels)
        self._spec = replace(self._spec, has_fused_kernels=kernels is not None)

    def compile_layers(self, backend: str) -> None:
        """Compile the denoiser's layers with `torch.compile` on their first call.

        The compiler makes its own kernels. Packed rows with their lengths on the device are untested with compiled
        layers. On a CPU, packed rows would need a compilation for each combination of row lengths.
        """
        for layer in self.denoiser.transformer.typed_layers:
            layer.compile(fullgraph=True, dynamic=True, backend=backend)
        packs_rows = self._spec.packs_rows and self._device.type != "cpu"
        self._spec = replace(self._spec, is_compiled=True, packs_rows=packs_rows, packs_segments=False)

    @property
    def spec(self) -> ModelSpec:
        return self._spec

    @property
    def device(self) -> torch.device:
        return self._device

    @torch.inference_mode()
    @exact
    def encode_text(self, prompts: Sequence[str]) -> list[TextEmbedding]:
        """See `DiffusionModel`. Padding is a learned vector (Stable Audio 3) or zero (Stable Audio Open)."""
        tokens = self.text.tokenize(prompts)
        ids_and_mask = to_device(tokens.ids_and_mask, self._device)
        ids, mask = ids_and_mask.unbind(1)
        embeddings: Tensor = self.prompt(self.text.encode(ids, mask), mask.bool())
        return TextEmbedding.each(prompts, embeddings, mask=mask, chars_read=tokens.chars_read)

    @torch.inference_mode()
    @exact
    def condition(
        self,
        plan: RowPlan,
        *,
        prompt: TextEmbedding,
        negative: TextEmbedding | None,
        inpaint_latents: Tensor | None,
    ) -> RowConditioning:
        """See `DiffusionModel`. The context of the unconditional branch has the negative prompt and its numbers. The
        padding of the negative prompt is zero, also if a learned vector is the padding of prompts. Without a negative
        prompt, the unconditional branch has no context. Everything else is equal in both branches.
        """
        numbers = self._embed_numbers(plan.numbers)
        global_cond = torch.cat([numbers[id_] for id_ in self._conditioners.global_ids], dim=-1)
        context = self._context(prompt.tokens, numbers)
        conditional = to_branch(self._condition_denoiser(context, global_cond, plan=plan, latents=inpaint_latents))
        if not any(evaluation.guided for evaluation in plan.sampler.evaluations):
            return RowConditioning(conditional, None)
        if negative is None:
            return RowConditioning(conditional, without_context(conditional))
        tokens = torch.where(negative.mask[:, None], negative.tokens, 0.0)
        if plan.negative_numbers is not None:
            numbers = self._embed_numbers(plan.negative_numbers)
        away = self.denoiser.project_context(self._context(tokens, numbers))[0]
        return RowConditioning(conditional, replace(conditional, constants={**conditional.constants, CONTEXT: away}))

    @abstractmethod
    def _condition_denoiser(
        self, context: Tensor, global_cond: Tensor, *, plan: RowPlan, latents: Tensor | None
    ) -> DenoiserConditioning:
        """Returns the conditioning of one row. `latents` are those of the source of an edit."""

    @torch.inference_mode()
    @exact
    def denoise(self, batch: StepBatch) -> Tensor:
        num_prefix = self._spec.num_prefix
        conditioning, packed = from_batch(batch, num_prefix=num_prefix), packed_layout(batch, num_prefix=num_prefix)
        return self.denoiser(batch.x, batch.t, conditioning=conditioning, valid=batch.valid, packed=packed).float()

    def _embed_numbers(self, values: Mapping[str, float]) -> dict[str, Tensor]:
        """Returns the embedding of each number (1, width) float32, by conditioner id."""
        return {
            id_: network(to_device(torch.tensor([values[id_]], dtype=torch.float32), self._device))
            for id_, network in self.numbers.items()
        }

    def _context(self, tokens: Tensor, numbers: Mapping[str, Tensor]) -> Tensor:
        """Join prompt tokens (tokens, width) and embedded numbers, (1, width) each, to a context (1, tokens, width).

        They are in the order of `context_ids`.
        """
        prompt_id = self._conditioners.prompt.id
        parts = [tokens if id_ == prompt_id else numbers[id_] for id_ in self._conditioners.context_ids]
        return torch.cat(parts)[None]


def to_branch(row: DenoiserConditioning) -> BranchConditioning:
    """Returns a single row's conditioning as named tensors.

    Local embeddings are in `constants` if they are equal in all frames, else in `by_frame`. A batch can have both kinds
    of rows, and missing names become zeros. `from_batch` therefore adds the local embeddings in `constants` and in
    `by_frame`.
    """
    constants, by_frame = {_GLOBAL: row.global_embed[0]}, {}
    if row.context is not None:
        constants[CONTEXT] = row.context[0]
    if row.local is not None:
        local = row.local[0]  # (layers, frames or 1, width)
        if local.shape[1] == 1:
            constants[_LOCAL] = local
        else:
            by_frame[_LOCAL] = local.transpose(1, 2).flatten(0, 1)
    return BranchConditioning(constants, by_frame)


def from_batch(batch: StepBatch, *, num_prefix: int = 0) -> DenoiserConditioning:
    """Returns the denoiser's conditioning for a batch. Packed rows have `num_prefix` tokens before their frames.

    If the batch has `segments`, the result's `context` has the stored contexts of all requests, not one per row.
    """
    if batch.segments is not None:
        return _from_segments(batch, batch.segments)
    embed, local = batch.constants[_GLOBAL], batch.constants.get(_LOCAL)
    if _LOCAL in batch.by_frame:
        frames = batch.by_frame[_LOCAL].unflatten(1, (-1, embed.shape[-1])).transpose(2, 3).contiguous()
        local = frames if local is None else frames + local
    if local is not None and batch.frames:
        local = _pack(local, batch.frames, num_prefix=num_prefix)
    return DenoiserConditioning(embed, batch.constants.get(CONTEXT), local)


def _from_segments(batch: StepBatch, segments: Segments) -> DenoiserConditioning:
    """Returns the conditioning with all stored contexts as `context`, and local embeddings per row or per token."""
    own = {
        name: batch.constants[name].index_select(0, batch.slots[name])
        for name in (_GLOBAL, _LOCAL)
        if name in batch.constants
    }
    local = own.get(_LOCAL)  # (rows, layers, 1, width)
    if _LOCAL in batch.by_frame:
        frames = batch.by_frame[_LOCAL].unflatten(1, (-1, own[_GLOBAL].shape[-1])).transpose(2, 3)
        if local is not None:
            by_token = local[:, :, 0].index_select(0, segments.rows).transpose(0, 1)
            frames = torch.where(segments.is_frame[:, None], frames + by_token, 0.0)
        local = frames.contiguous()  # (1, layers, tokens, width)
    return DenoiserConditioning(own[_GLOBAL], batch.constants.get(CONTEXT), local)


def _pack(local: Tensor, frames: Sequence[int], *, num_prefix: int) -> Tensor:
    """Convert local embeddings of rows (rows, layers, frames or 1, width) to (1, layers, tokens of all rows, width).

    They are zero at prefix tokens.
    """
    nothing = local.new_zeros(local.shape[1], num_prefix, local.shape[3])
    owns = (row[:, :count].expand(-1, count, -1) for row, count in zip(local, frames, strict=True))
    return torch.cat([part for own in owns for part in (nothing, own)], dim=1)[None]
