"""Runs of the reference repeated through the real engine: a model that can be watched, and the rows that come out."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from stable_audio_serve.core.generation import GenerationRequest
from stable_audio_serve.engine import Engine, EngineOptions
from stable_audio_serve.models.forwarding import ForwardingModel
from stable_audio_serve.models.protocol import DecodeWindow, DiffusionModel, EncodeWindow, ModelSpec, RowPlan
from stable_audio_serve.sampling import NoiseSource, ReplayDraw, ReplayNoise
from stable_audio_serve.verification.cases import Case
from stable_audio_serve.verification.replay import DrawProbe, SilentWindows, replay_script


@dataclass(frozen=True, slots=True)
class RowResult:
    """One row of a run: its plan, final latents (D, F), and audio (C, S) of the row's own length."""

    plan: RowPlan
    latents: Tensor
    audio: Tensor


class ObservedModel(ForwardingModel):
    """A model whose rows are decoded whole, headroom included, so that their final latents can be read.

    `noise` and `latents` are by the row's number, which is its seed.
    """

    def __init__(self, model: DiffusionModel) -> None:
        super().__init__(model)
        self.noise: dict[int, NoiseSource] = {}
        self.latents: dict[int, Tensor] = {}

    @property
    def spec(self) -> ModelSpec:
        """The model's, but every call of the decoder is made anew, so that it is seen."""
        return replace(super().spec, captures_decode=False)

    def plan(self, request: GenerationRequest, *, frames: int | None = None) -> tuple[RowPlan, ...]:
        """Returns the model's plans, with the result as long as the latents."""
        plans = super().plan(request, frames=frames)
        return tuple(replace(plan, output_samples=plan.frames * self.spec.hop) for plan in plans)

    def decode(self, windows: Sequence[DecodeWindow]) -> list[Tensor]:
        """Decode by the model and keep the latents."""
        for window in windows:
            row = next((row for row, noise in self.noise.items() if noise is window.noise), None)
            if row is not None:
                self.latents[row][:, window.start : window.start + window.latents.shape[1]] = window.latents.cpu()
        return super().decode(windows)


class NumFrames(Protocol):
    """A family's length rule for one run of the reference."""

    def __call__(self, duration_s: float, *, padding_s: float, sample_size: int) -> int:
        """Returns latent frames of the longest duration and its headroom; `sample_size` (audio samples) caps them."""
        ...


class Runner:
    """Repeats cases through one engine."""

    def __init__(self, model: DiffusionModel, *, num_frames: NumFrames, observed: ObservedModel | None = None) -> None:
        """`observed` wraps the model; None = nothing but observes it."""
        self._model = model
        self._observed = observed or ObservedModel(model)
        self._probe = DrawProbe(model)
        self._num_frames = num_frames
        options = EngineOptions(warmup_budget_s=0.0, max_queue_s=1e9)
        self._engine = Engine(self._observed, options, noise_factory=lambda seed: self._observed.noise[seed])

    def plan(self, case: Case) -> list[RowPlan]:
        """Returns one plan per row, all with the latent length of the longest."""
        frames = self._frames(case)
        return [self._model.plan(request, frames=frames)[0] for request in case.requests]

    def script(self, case: Case) -> list[ReplayDraw]:
        """Returns the random draws of the case in order."""
        channels = self._model.spec.card.latent_channels
        return replay_script(self.plan(case)[0], self._probe, latent_channels=channels, num_rows=len(case.requests))

    async def run(self, case: Case) -> list[RowResult]:
        """Run all rows of a case together, with the reference's noise."""
        replay = ReplayNoise(case.seed, self.script(case), num_rows=len(case.requests))
        return await self.run_with(case, [replay.row(row) for row in range(len(case.requests))])

    async def run_silent(self, case: Case) -> list[RowResult]:
        """Run a case without noise inside the autoencoder; its draws are not made either."""
        script = [draw for draw in self.script(case) if draw.stage in ("initial", "step")]
        replay = ReplayNoise(case.seed, script, num_rows=len(case.requests))
        return await self.run_with(case, [SilentWindows(replay.row(row)) for row in range(len(case.requests))])

    def silent_inpaint_conditioning(self, case: Case) -> Tensor:
        """Returns the first row's local conditioning: mask, then kept latents, encoded without noise (1, 1 + D, F)."""
        plan = self.plan(case)[0]
        if plan.inpaint_source is None or plan.keep_mask is None:
            return torch.zeros(1, 1 + self._model.spec.card.latent_channels, plan.frames)
        hop, noise = self._model.spec.hop, SilentWindows(ReplayNoise(0, (), num_rows=1).row(0))
        latents = torch.zeros(self._model.spec.card.latent_channels, plan.frames)
        for span in plan.inpaint_source.windows:
            samples = plan.inpaint_source.cut(span, hop=hop)
            window = EncodeWindow(samples=samples, start=span.start, stage="inpaint", noise=noise)
            encoded = self._model.encode_audio([window])[0].cpu()
            kept = slice(span.keep_start - span.start, span.keep_stop - span.start)
            latents[:, span.keep_start : span.keep_stop] = encoded[:, kept]
        return torch.cat([plan.keep_mask[None], latents * plan.keep_mask])[None]

    async def close(self) -> None:
        await self._engine.close()

    def _frames(self, case: Case) -> int:
        longest_s = max(request.duration_s for request in case.requests)
        padding_s = case.requests[0].duration_padding_s or 0.0
        return self._num_frames(longest_s, padding_s=padding_s, sample_size=case.sample_size)

    async def run_with(self, case: Case, noise: Sequence[NoiseSource]) -> list[RowResult]:
        """Run all rows of a case together, each with its own noise."""
        plans, channels = self.plan(case), self._model.spec.card.latent_channels
        self._observed.noise = dict(enumerate(noise))
        self._observed.latents = {row: torch.zeros(channels, plan.frames) for row, plan in enumerate(plans)}
        generations = (self._engine.generate(request, frames=plans[0].frames) for request in case.requests)
        results = await asyncio.gather(*generations)
        return [
            RowResult(plan, self._observed.latents[row], torch.from_numpy(result.audio[0])[:, : plan.output_samples])
            for row, (plan, result) in enumerate(zip(plans, results, strict=True))
        ]
