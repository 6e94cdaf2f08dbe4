"""A loaded Stable Audio Open model that implements the engine's protocol. Its networks are public attributes.

Batch rows do not affect each other. Public methods run without gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stable_audio_serve.core.catalog import DecodePrecision
from stable_audio_serve.core.generation import GenerationRequest
from stable_audio_serve.models.native import Components, NativeModel
from stable_audio_serve.models.native_denoiser import DenoiserConditioning
from stable_audio_serve.models.parts import WindowNoise, stack_draws
from stable_audio_serve.models.protocol import (
    DecodeWindow,
    EncodeWindow,
    ModelSpec,
    RowPlan,
)
from stable_audio_serve.models.sao.config import SaoConfig
from stable_audio_serve.models.sao.denoiser import Denoiser
from stable_audio_serve.models.sao.oobleck import OobleckAutoencoder
from stable_audio_serve.models.sao.planning import plan_rows, read_shift
from stable_audio_serve.models.switches import exact
from stable_audio_serve.sampling.transfer import to_device

SaoComponents = Components[Denoiser, OobleckAutoencoder]


class SaoModel(NativeModel[Denoiser, OobleckAutoencoder]):
    """Implements `DiffusionModel` for the Stable Audio Open family."""

    def __init__(
        self,
        components: SaoComponents,
        *,
        config: SaoConfig,
        spec: ModelSpec,
        device: torch.device,
        decode_precision: DecodePrecision = "float32",
    ) -> None:
        super().__init__(components, conditioners=config, spec=spec, device=device, decode_precision=decode_precision)
        self.config = config
        self._shift = read_shift(config.shift)

    def plan(self, request: GenerationRequest, *, frames: int | None = None) -> tuple[RowPlan, ...]:
        return plan_rows(
            request, spec=self._spec, autoencoder=self.config.autoencoder, shift=self._shift, frames=frames
        )

    @torch.inference_mode()
    @exact
    def encode_audio(self, windows: Sequence[EncodeWindow]) -> list[Tensor]:
        """See `DiffusionModel`. The variational bottleneck adds noise to each latent."""
        audio = to_device(torch.stack([window.samples for window in windows]).float(), self._device)
        shape = (self._spec.card.latent_channels, audio.shape[-1] // self._spec.hop)
        noises = [WindowNoise(window.noise, window.stage, window.start) for window in windows]
        noise = stack_draws(noises, "bottleneck", shape=shape, frame_axis=1, device=self._device)
        return list(self.autoencoder.encode(audio, noise).float())

    @torch.inference_mode()
    def decode(self, windows: Sequence[DecodeWindow]) -> list[Tensor]:
        latents = torch.stack([window.latents for window in windows]).to(self._device, torch.float32)
        with self._products():
            audio = self.autoencoder.decode(latents)
        return list(audio.float())

    def _condition_denoiser(
        self, context: Tensor, global_cond: Tensor, *, plan: RowPlan, latents: Tensor | None
    ) -> DenoiserConditioning:
        return self.denoiser.condition(context, global_cond)
