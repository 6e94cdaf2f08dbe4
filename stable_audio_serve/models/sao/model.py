"""A loaded Stable Audio Open model that implements the engine's protocol. Its networks are public attributes.

Batch rows do not affect each other. Public methods run without gradients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from stable_audio_serve.core.catalog import DecodePrecision
from stable_audio_serve.core.generation import GenerationRequest
from stable_audio_serve.models.blocks.attention import name_kernels
from stable_audio_serve.models.blocks.varlen import has_varlen
from stable_audio_serve.models.conditioners import NumberConditioner, PromptConditioner
from stable_audio_serve.models.native import CONTEXT, NativeModel, packed_layout, with_context, without_context
from stable_audio_serve.models.native_denoiser import DenoiserConditioning
from stable_audio_serve.models.onednn import use_onednn
from stable_audio_serve.models.parts import WindowNoise, stack_draws
from stable_audio_serve.models.protocol import (
    BranchConditioning,
    DecodeWindow,
    EncodeWindow,
    ModelSpec,
    RowConditioning,
    RowPlan,
    StepBatch,
    TextEmbedding,
)
from stable_audio_serve.models.sao.config import SaoConfig
from stable_audio_serve.models.sao.denoiser import Denoiser
from stable_audio_serve.models.sao.oobleck import OobleckAutoencoder
from stable_audio_serve.models.sao.planning import Halos, plan_rows, read_shift
from stable_audio_serve.models.switches import exact
from stable_audio_serve.models.text_encoder import TextEncoder
from stable_audio_serve.sampling.transfer import to_device

_GLOBAL = "global"


@dataclass(frozen=True, slots=True)
class SaoComponents:
    """The networks of one checkpoint, loaded and on their device. `numbers` has number conditioners by their id."""

    text: TextEncoder
    prompt: PromptConditioner
    numbers: dict[str, NumberConditioner]
    denoiser: Denoiser
    autoencoder: OobleckAutoencoder

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """Returns all networks, including the text encoder."""
        return (self.text.encoder, self.prompt, *self.numbers.values(), self.denoiser, self.autoencoder)


class SaoModel(NativeModel):
    """Implements `DiffusionModel` for the Stable Audio Open family."""

    prompt: PromptConditioner
    denoiser: Denoiser
    autoencoder: OobleckAutoencoder

    def __init__(
        self,
        components: SaoComponents,
        *,
        config: SaoConfig,
        spec: ModelSpec,
        device: torch.device,
        decode_precision: DecodePrecision = "float32",
    ) -> None:
        for network in components.modules:
            use_onednn(network)
        self.numbers = components.numbers
        self.denoiser = components.denoiser
        self.autoencoder = components.autoencoder
        self.config = config
        net = config.denoiser
        heads = {
            "num_heads": net.num_heads,
            "num_key_heads": net.num_key_heads,
            "head_width": net.head_width,
        }
        dtype = self.denoiser.dtype
        spec = replace(
            spec,
            packs_segments=has_varlen(device, dtype, **heads),
            attention=name_kernels(device, dtype, num_heads=net.num_heads, head_width=net.head_width),
            num_prefix=net.num_prefix,
            dtype=dtype,
        )
        super().__init__(
            components.text, components.prompt, spec=spec, device=device, decode_precision=decode_precision
        )
        self._shift = read_shift(config.shift)
        self._halos = Halos(config.autoencoder.decoder_halo_latents, config.autoencoder.encoder_halo_latents)

    def plan(self, request: GenerationRequest, *, frames: int | None = None) -> tuple[RowPlan, ...]:
        """Returns one plan per variation. Raises InvalidRequestError naming the field if a value cannot be served."""
        return plan_rows(request, spec=self._spec, halos=self._halos, shift=self._shift, frames=frames)

    @torch.inference_mode()
    @exact
    def encode_audio(self, windows: Sequence[EncodeWindow]) -> list[Tensor]:
        """Returns the latents (latent channels, frames) float32 of each window. Windows must have equal lengths.

        The variational bottleneck adds noise to each latent.
        """
        audio = to_device(torch.stack([window.samples for window in windows]).float(), self._device)
        shape = (self._spec.card.latent_channels, audio.shape[-1] // self._spec.hop)
        noises = [WindowNoise(window.noise, window.stage, window.start) for window in windows]
        noise = stack_draws(noises, "bottleneck", shape=shape, frame_axis=1, device=self._device)
        return list(self.autoencoder.encode(audio, noise).float())

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
        """Returns a row's conditioning, the same in all steps. Without guidance, there is no unconditional branch.

        The context of the unconditional branch has the tokens and numbers of the negative prompt. Without a negative
        prompt, the unconditional branch has no context. Both branches have the same global vector.
        """
        numbers = self._embed_numbers(plan.numbers)
        global_cond = torch.cat([numbers[id_] for id_ in self.config.global_ids], dim=-1)
        conditional = to_branch(self.denoiser.condition(self._context(prompt.tokens, numbers), global_cond))
        if not any(evaluation.guided for evaluation in plan.sampler.evaluations):
            return RowConditioning(conditional, None)
        if negative is None:
            return RowConditioning(conditional, without_context(conditional))
        others = self._embed_numbers(plan.negative_numbers or plan.numbers)
        away = self.denoiser.project_context(self._context(negative.tokens, others))[0]
        return RowConditioning(conditional, with_context(conditional, away))

    @torch.inference_mode()
    @exact
    def denoise(self, batch: StepBatch) -> Tensor:
        """Returns v or velocity, depending on the training objective, float32, in the shape of `batch.x`.

        Rows do not affect each other's valid frames.
        """
        conditioning, packed = from_batch(batch), packed_layout(batch, num_prefix=self.config.denoiser.num_prefix)
        return self.denoiser(batch.x, batch.t, conditioning=conditioning, valid=batch.valid, packed=packed).float()

    @torch.inference_mode()
    def decode(self, windows: Sequence[DecodeWindow]) -> list[Tensor]:
        """Returns the audio (channels, hop * frames) float32 of each window, not clamped to -1..1.

        Windows must have equal lengths.
        """
        latents = torch.stack([window.latents for window in windows]).to(self._device, torch.float32)
        with self._products():
            audio = self.autoencoder.decode(latents)
        return list(audio.float())

    def _embed_numbers(self, values: Mapping[str, float]) -> dict[str, Tensor]:
        """Returns the embedding of each number (1, width) float32, by conditioner id."""
        return {
            id_: number(to_device(torch.tensor([values[id_]], dtype=torch.float32), self._device))
            for id_, number in self.numbers.items()
        }

    def _context(self, tokens: Tensor, numbers: Mapping[str, Tensor]) -> Tensor:
        """Join prompt tokens (tokens, width) and embedded numbers, (1, width) each, to a context (1, tokens, width).

        They are in the order of `config.context_ids`.
        """
        prompt_id = self.config.prompt.id
        return torch.cat([tokens if id_ == prompt_id else numbers[id_] for id_ in self.config.context_ids])[None]


def to_branch(row: DenoiserConditioning) -> BranchConditioning:
    """Returns a single row's conditioning as named tensors."""
    constants = {_GLOBAL: row.global_embed[0]}
    if row.context is not None:
        constants[CONTEXT] = row.context[0]
    return BranchConditioning(constants)


def from_batch(batch: StepBatch) -> DenoiserConditioning:
    """Returns the denoiser's conditioning for a batch.

    If the batch has `segments`, the result's `context` has the stored contexts of all requests, not one per row.
    """
    embed = batch.constants[_GLOBAL]
    if batch.segments is not None:
        embed = embed.index_select(0, batch.slots[_GLOBAL])
    return DenoiserConditioning(embed, batch.constants.get(CONTEXT))
