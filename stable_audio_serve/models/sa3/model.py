"""A loaded Stable Audio 3 model that implements the engine's protocol. Its networks are public attributes.

Batch rows do not affect each other. Public methods run without gradients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from stable_audio_serve.core.catalog import DecodePrecision
from stable_audio_serve.core.generation import GenerationRequest
from stable_audio_serve.models.adapters.header import CONDITIONERS
from stable_audio_serve.models.native import Components, NativeModel
from stable_audio_serve.models.native_denoiser import DenoiserConditioning
from stable_audio_serve.models.oscillator.timeline import timeline_features
from stable_audio_serve.models.parts import WindowNoise
from stable_audio_serve.models.protocol import (
    DecodeWindow,
    EncodeWindow,
    ModelSpec,
    RowPlan,
    WindowRule,
)
from stable_audio_serve.models.sa3.autoencoder import AudioAutoencoder
from stable_audio_serve.models.sa3.config import Sa3Config
from stable_audio_serve.models.sa3.denoiser import CONDITION_LAYERS, Denoiser
from stable_audio_serve.models.sa3.planning import plan_rows
from stable_audio_serve.models.switches import exact
from stable_audio_serve.sampling.schedules import CONFIG_KEY, shift_from_config
from stable_audio_serve.sampling.transfer import to_device

Sa3Components = Components[Denoiser, AudioAutoencoder]


class Sa3Model(NativeModel[Denoiser, AudioAutoencoder]):
    """Implements `DiffusionModel` for the Stable Audio 3 family."""

    def __init__(
        self,
        components: Sa3Components,
        *,
        config: Sa3Config,
        spec: ModelSpec,
        device: torch.device,
        decode_precision: DecodePrecision = "float32",
    ) -> None:
        super().__init__(components, conditioners=config, spec=spec, device=device, decode_precision=decode_precision)
        self.config = config
        self._decode_rule = WindowRule(self.autoencoder.decoder_halo_latents, self.autoencoder.latent_multiple)
        self._shift = shift_from_config(config.shift, key=f"model.diffusion.{CONFIG_KEY}")

    @property
    def adaptable(self) -> Mapping[str, nn.Module]:
        return {"model.": self.denoiser} | {f"{CONDITIONERS}{id_}.": net for id_, net in self.numbers.items()}

    def runs_in_steps(self, layer: str) -> bool:
        return layer.startswith("model.") and not any(part in layer for part in CONDITION_LAYERS)

    def plan(self, request: GenerationRequest, *, frames: int | None = None) -> tuple[RowPlan, ...]:
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
        audio = to_device(torch.stack([window.samples for window in windows]).float(), self._device)
        noise = [WindowNoise(window.noise, window.stage, window.start) for window in windows]
        frames = -(-audio.shape[-1] // self._spec.hop)
        return list(self.autoencoder.encode(audio, noise)[..., :frames].float())

    @torch.inference_mode()
    def decode(self, windows: Sequence[DecodeWindow]) -> list[Tensor]:
        latents = torch.stack([window.latents for window in windows]).to(self._device, torch.float32)
        noise = [WindowNoise(window.noise, "decode", window.start) for window in windows]
        audio = self.autoencoder.decode(latents, noise, products=self._products)
        return list(audio[..., : latents.shape[-1] * self._spec.hop].float())

    def _condition_denoiser(
        self, context: Tensor, global_cond: Tensor, *, plan: RowPlan, latents: Tensor | None
    ) -> DenoiserConditioning:
        return self.denoiser.condition(context, global_cond, local=self._local_conditioning(plan, latents))

    def _local_conditioning(self, plan: RowPlan, latents: Tensor | None) -> Tensor | None:
        """Returns the local (per-frame) conditioning (1, local width, frames) of a row.

        It contains the mask of kept frames, the kept latents and the features of the timeline. If the row has none of
        these, returns zeros for one frame. Returns None for a network without local conditioning.
        """
        if not self.config.local_ids:
            return None
        if plan.keep_mask is not None and latents is not None:
            mask = to_device(plan.keep_mask, self._device)[None]
            kept = torch.where(mask > 0, latents, torch.zeros_like(latents))
        elif self.config.timelines:
            mask = torch.zeros(1, plan.frames, device=self._device)
            kept = torch.zeros(self._spec.card.latent_channels, plan.frames, device=self._device)
        else:
            return torch.zeros(1, self.config.denoiser.local_width, 1, device=self._device)
        parts = {"inpaint_mask": mask, "inpaint_masked_input": kept}
        if self.config.timelines:
            features = timeline_features(
                plan.frames,
                frame_s=self._spec.hop / self._spec.card.sample_rate_hz,
                seconds_total=plan.numbers["seconds_total"],
                tempo_bpm=plan.numbers["tempo_bpm"],
            )
            parts |= dict.fromkeys(self.config.timelines, to_device(features, self._device))
        return torch.cat([parts[id_] for id_ in self.config.local_ids])[None]
