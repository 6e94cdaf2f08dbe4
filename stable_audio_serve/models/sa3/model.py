"""A loaded Stable Audio 3 model that implements the engine's protocol. Its networks are public attributes.

Batch rows do not affect each other. Public methods run without gradients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor, nn

from stable_audio_serve.core.catalog import DecodePrecision
from stable_audio_serve.core.generation import GenerationRequest
from stable_audio_serve.models.adapters.apply import is_adapted
from stable_audio_serve.models.adapters.header import CONDITIONERS
from stable_audio_serve.models.blocks.attention import name_kernels
from stable_audio_serve.models.blocks.packed import join_local
from stable_audio_serve.models.blocks.varlen import has_varlen
from stable_audio_serve.models.conditioners import NumberConditioner, PromptConditioner
from stable_audio_serve.models.native import CONTEXT, NativeModel, packed_layout, with_context, without_context
from stable_audio_serve.models.native_denoiser import DenoiserConditioning
from stable_audio_serve.models.onednn import use_onednn
from stable_audio_serve.models.parts import WindowNoise
from stable_audio_serve.models.protocol import (
    BranchConditioning,
    DecodeWindow,
    EncodeWindow,
    ModelSpec,
    RowConditioning,
    RowPlan,
    StepBatch,
    TextEmbedding,
    WindowRule,
)
from stable_audio_serve.models.sa3.autoencoder import AudioAutoencoder
from stable_audio_serve.models.sa3.config import Sa3Config
from stable_audio_serve.models.sa3.denoiser import CONDITION_LAYERS, Denoiser
from stable_audio_serve.models.sa3.planning import plan_rows
from stable_audio_serve.models.segments import Segments
from stable_audio_serve.models.switches import exact
from stable_audio_serve.models.text_encoder import TextEncoder
from stable_audio_serve.sampling.schedules import CONFIG_KEY, shift_from_config
from stable_audio_serve.sampling.transfer import to_device

_GLOBAL, _LOCAL = "global", "local"

_KEPT_NUMBERS = 256  # embeddings of numbers, for example of durations


@dataclass(frozen=True, slots=True)
class Sa3Components:
    """The networks of one checkpoint, loaded and on their device. `numbers` has number conditioners by their id."""

    text: TextEncoder
    prompt: PromptConditioner
    numbers: dict[str, NumberConditioner]
    denoiser: Denoiser
    autoencoder: AudioAutoencoder

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """Returns all networks, including the text encoder."""
        return (self.text.encoder, self.prompt, *self.numbers.values(), self.denoiser, self.autoencoder)


class Sa3Model(NativeModel):
    """Implements `DiffusionModel` for the Stable Audio 3 family."""

    prompt: PromptConditioner
    denoiser: Denoiser
    autoencoder: AudioAutoencoder

    def __init__(
        self,
        components: Sa3Components,
        *,
        config: Sa3Config,
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
        heads = {"num_heads": net.num_heads, "num_key_heads": net.num_heads, "head_width": net.width // net.num_heads}
        spec = replace(
            spec,
            packs_segments=has_varlen(device, self.denoiser.dtype, **heads),
            attention=name_kernels(
                device, self.denoiser.dtype, num_heads=net.num_heads, head_width=heads["head_width"]
            ),
            num_prefix=net.num_prefix,
            dtype=self.denoiser.dtype,
        )
        super().__init__(
            components.text, components.prompt, spec=spec, device=device, decode_precision=decode_precision
        )
        self._decode_rule = WindowRule(self.autoencoder.decoder_halo_latents, self.autoencoder.latent_multiple)
        # Most clips have one of a few durations, and on a GPU an embedding starts twelve kernels.
        self._kept_number = lru_cache(maxsize=_KEPT_NUMBERS)(self._compute_number)
        self._shift = shift_from_config(config.shift, key=f"model.diffusion.{CONFIG_KEY}")

    @property
    def adaptable(self) -> Mapping[str, nn.Module]:
        """The networks that adapters can change. A key is the prefix of the network's layers in adapter files."""
        return {"model.": self.denoiser} | {f"{CONDITIONERS}{id_}.": net for id_, net in self.numbers.items()}

    def runs_in_steps(self, layer: str) -> bool:
        """Whether `denoise` runs the layer that adapter files name `layer`. Other layers run in `condition`."""
        return layer.startswith("model.") and not any(part in layer for part in CONDITION_LAYERS)

    def plan(self, request: GenerationRequest, *, frames: int | None = None) -> tuple[RowPlan, ...]:
        """Returns one plan per variation. Raises InvalidRequestError naming the field if a value cannot be served."""
        return plan_rows(
            request,
            config=self.config,
            spec=self._spec,
            decode_rule=self._decode_rule,
            shift=self._shift,
            frames=frames,
        )

    @torch.inference_mode()
    @exact
    def encode_audio(self, windows: Sequence[EncodeWindow]) -> list[Tensor]:
        """Returns the latents (latent channels, frames) float32 of each window. Windows must have equal lengths."""
        audio = to_device(torch.stack([window.samples for window in windows]).float(), self._device)
        noise = [WindowNoise(window.noise, window.stage, window.start) for window in windows]
        frames = -(-audio.shape[-1] // self._spec.hop)
        return list(self.autoencoder.encode(audio, noise)[..., :frames].float())

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

        The context of the unconditional branch has the negative prompt and the same numbers as the conditional branch.
        The padding of the negative prompt is zero instead of the learned vector. Without a negative prompt, the
        unconditional branch has no context.
        """
        numbers = {id_: self._embed_number(id_, plan.numbers[id_]) for id_ in self.numbers}
        global_cond = torch.cat([numbers[id_] for id_ in self.config.global_ids], dim=-1)
        local = self._local_conditioning(plan, inpaint_latents)
        conditional = to_branch(
            self.denoiser.condition(self._context(prompt.tokens, numbers), global_cond, local=local)
        )
        if not any(evaluation.guided for evaluation in plan.sampler.evaluations):
            return RowConditioning(conditional, None)
        if negative is None:
            return RowConditioning(conditional, without_context(conditional))
        tokens = torch.where(negative.mask[:, None], negative.tokens, torch.zeros_like(negative.tokens))
        away = self.denoiser.project_context(self._context(tokens, numbers))[0]
        return RowConditioning(conditional, with_context(conditional, away))

    @torch.inference_mode()
    @exact
    def denoise(self, batch: StepBatch) -> Tensor:
        """Returns the velocity, float32, in the shape of `batch.x`. Rows do not affect each other's valid frames."""
        num_prefix = self.config.denoiser.num_prefix
        conditioning, packed = from_batch(batch, num_prefix=num_prefix), packed_layout(batch, num_prefix=num_prefix)
        return self.denoiser(batch.x, batch.t, conditioning=conditioning, valid=batch.valid, packed=packed).float()

    @torch.inference_mode()
    def decode(self, windows: Sequence[DecodeWindow]) -> list[Tensor]:
        """Returns the audio (channels, hop * frames) float32 of each window, not clamped to -1..1.

        Windows must have equal lengths.
        """
        latents = torch.stack([window.latents for window in windows]).to(self._device, torch.float32)
        noise = [WindowNoise(window.noise, "decode", window.start) for window in windows]
        audio = self.autoencoder.decode(latents, noise, products=self._products)
        return list(audio[..., : latents.shape[-1] * self._spec.hop].float())

    def _embed_number(self, id_: str, value: float) -> Tensor:
        """Returns the embedding of a number (1, width) float32."""
        compute = self._compute_number if is_adapted(self.numbers[id_]) else self._kept_number
        return compute(id_, value)

    def _compute_number(self, id_: str, value: float) -> Tensor:
        return self.numbers[id_](to_device(torch.tensor([value], dtype=torch.float32), self._device))

    def _context(self, tokens: Tensor, numbers: dict[str, Tensor]) -> Tensor:
        """Join prompt tokens (tokens, width) and embedded numbers, (1, width) each, to a context (1, tokens, width).

        They are in the order of `config.context_ids`.
        """
        prompt_id = self.config.prompt.id
        parts = [tokens if id_ == prompt_id else numbers[id_] for id_ in self.config.context_ids]
        return torch.cat(parts)[None]

    def _local_conditioning(self, plan: RowPlan, latents: Tensor | None) -> Tensor | None:
        """Returns the local (per-frame) conditioning (1, local width, frames) of a row.

        It contains the mask of kept frames, the kept latents and the features of frame conditioners. If the row has
        none of these, returns zeros for one frame. Returns None for a network without local conditioning.
        """
        if not self.config.local_ids:
            return None
        keeps = plan.keep_mask is not None and latents is not None
        if not keeps and not self.config.frame_conditioners:
            return torch.zeros(1, self.config.denoiser.local_width, 1, device=self._device)
        parts: dict[str, Tensor] = {}
        if plan.keep_mask is not None and latents is not None:
            mask = to_device(plan.keep_mask, self._device)[None]
            parts["inpaint_mask"] = mask
            parts["inpaint_masked_input"] = torch.where(mask > 0, latents, torch.zeros_like(latents))
        else:
            parts["inpaint_mask"] = torch.zeros(1, plan.frames, device=self._device)
            parts["inpaint_masked_input"] = torch.zeros(
                self._spec.card.latent_channels, plan.frames, device=self._device
            )
        frame_s = self._spec.hop / self._spec.card.sample_rate_hz
        for id_, conditioner in self.config.frame_conditioners.items():
            features = conditioner.features(plan.frames, frame_s=frame_s, numbers=plan.numbers)
            parts[id_] = to_device(features, self._device)
        return torch.cat([parts[id_] for id_ in self.config.local_ids])[None]


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
    """Convert local embeddings of rows (rows, layers, frames or 1, width) to (1, layers, tokens of all rows, width)."""
    rows = [row[None, :, :own] for row, own in zip(local, frames, strict=True)]
    return join_local(rows, frames=frames, num_prefix=num_prefix)
