"""Runs of a reference repeated through the real engine: its random draws, and the latents and audio that come out."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stable_audio_serve.core.generation import GenerationRequest, GenerationResult
from stable_audio_serve.engine import Engine, EngineOptions
from stable_audio_serve.models.forwarding import ForwardingModel
from stable_audio_serve.models.protocol import (
    DecodeWindow,
    DiffusionModel,
    EncodeWindow,
    ModelSpec,
    RowPlan,
    TextEmbedding,
)
from stable_audio_serve.models.sa3.lengths import plan_length
from stable_audio_serve.models.sa3.model import Sa3Model
from stable_audio_serve.models.windows import whole_window
from stable_audio_serve.sampling import NoiseSource, ReplayDraw, ReplayNoise, SeededNoise
from stable_audio_serve.verification.cases import Case
from stable_audio_serve.verification.samplers import Script, sampler_script

SOURCE_DRAW = "init/bottleneck"  # of the Stable Audio Open family, whose reference encodes a source in one piece


class RowNoise:
    """A row's noise with another inside the autoencoder: its part of one draw over all frames (D, F), or zeros.

    `asked` has what was drawn there for one row, and the axis of each draw that counts frames.
    """

    def __init__(self, source: NoiseSource, drawn: Tensor | None = None) -> None:
        self._source, self._drawn = source, drawn
        self.asked: list[tuple[ReplayDraw, int]] = []

    def initial(self, shape: tuple[int, ...]) -> Tensor:
        return self._source.initial(shape)

    def step(self, shape: tuple[int, ...]) -> Tensor:
        return self._source.step(shape)

    def window(
        self, stage: str, start: int, *, shape: tuple[int, ...], frame_axis: int, device: torch.device
    ) -> Tensor:
        self.asked.append((ReplayDraw(stage, start, shape), frame_axis))
        if self._drawn is None:
            return torch.zeros(shape, device=device)
        return self._drawn.narrow(frame_axis, start, shape[frame_axis]).to(device)


@dataclass(frozen=True, slots=True)
class RowResult:
    """One row of a run: its plan, final latents (D, F), and audio (C, S) of the row's own length."""

    plan: RowPlan
    latents: Tensor
    audio: Tensor


class ObservedModel(ForwardingModel):
    """A model whose rows are decoded whole, headroom included, so that their final latents can be read.

    `noise` is by the row's number, which is its seed; `texts` take the place of the text encoder.
    """

    def __init__(
        self, model: DiffusionModel, *, noise: Sequence[NoiseSource], texts: Mapping[str, TextEmbedding]
    ) -> None:
        super().__init__(model)
        self._noise, self._texts = noise, texts
        self.latents: list[dict[int, Tensor]] = [{} for _ in noise]  # by row and frame, (D,)

    @property
    def spec(self) -> ModelSpec:
        return replace(super().spec, captures_decode=False)  # every call of the decoder is made anew, to be seen

    def plan(self, request: GenerationRequest, *, frames: int | None = None) -> tuple[RowPlan, ...]:
        plans = super().plan(request, frames=frames)
        return tuple(replace(plan, output_samples=plan.frames * self.spec.hop) for plan in plans)

    def encode_text(self, prompts: Sequence[str]) -> list[TextEmbedding]:
        return [self._texts[prompt] for prompt in prompts] if self._texts else super().encode_text(prompts)

    def decode(self, windows: Sequence[DecodeWindow]) -> list[Tensor]:
        for window in windows:
            row = next((row for row, noise in enumerate(self._noise) if noise is window.noise), None)
            if row is not None:
                self.latents[row] |= dict(enumerate(window.latents.cpu().unbind(1), window.start))
        return super().decode(windows)


def run_case(
    model: DiffusionModel,
    case: Case,
    *,
    noise: Sequence[NoiseSource],
    texts: Mapping[str, TextEmbedding] | None = None,
) -> list[RowResult]:
    """Run all rows of a case together, each with its own noise; `texts` are the prompts if the model is not asked."""
    plans, observed = plan_case(model, case), ObservedModel(model, noise=noise, texts=texts or {})

    async def generate() -> list[GenerationResult]:
        options = EngineOptions(warmup_budget_s=0.0, max_queue_s=1e9)
        async with Engine(observed, options, noise_factory=lambda seed: noise[seed]) as engine:
            return await asyncio.gather(*(engine.generate(row, frames=plans[0].frames) for row in case.requests))

    results = []
    for plan, result, latents in zip(plans, asyncio.run(generate()), observed.latents, strict=True):
        made = torch.stack([latents[frame] for frame in range(plan.frames)], dim=1)
        results.append(RowResult(plan, made, torch.from_numpy(result.audio[0])[:, : plan.output_samples]))
    return results


def plan_case(model: DiffusionModel, case: Case) -> list[RowPlan]:
    """Returns one plan per row, all with the latent length of the longest and its headroom.

    In the Stable Audio Open family a run is as long as its window, whatever the clip's duration.
    """
    frames = case.sample_size // model.spec.hop
    if isinstance(model, Sa3Model):
        rule = replace(model.config.lengths, max_samples=case.sample_size)
        longest_s = max(request.duration_s for request in case.requests)
        frames = plan_length(longest_s, rule, padding_s=case.requests[0].duration_padding_s or 0.0).frames
    return [model.plan(request, frames=frames)[0] for request in case.requests]


def draw_script(model: DiffusionModel, case: Case) -> Script:
    """Returns the reference's draws in order: start noise, source windows, sampler steps, decode windows.

    What is drawn in a window is what the model asks for there. A source is encoded once for all rows.
    """
    plan, hop, num_rows = plan_case(model, case)[0], model.spec.hop, len(case.requests)
    latent = (num_rows, model.spec.card.latent_channels, plan.frames)
    encoding, decoding = RowNoise(SeededNoise(0)), RowNoise(SeededNoise(0))
    for stage, source in (("init", plan.init_source), ("inpaint", plan.inpaint_source)):
        for span in (
            () if source is None else source.windows if isinstance(model, Sa3Model) else whole_window(plan.frames)
        ):
            silence = torch.zeros(model.spec.card.channels, (span.stop - span.start) * hop)
            model.encode_audio([EncodeWindow(silence, span.start, stage, encoding)])
    for span in plan.decode_windows:
        zeros = torch.zeros(latent[1], span.stop - span.start, device=model.device)
        model.decode([DecodeWindow(zeros, span.start, decoding)])
    return [
        ReplayDraw("initial", 0, latent),
        *(_over_batch(*asked, num_rows=1) for asked in encoding.asked),
        *sampler_script(case.requests[0].sampler or "", plan.sampler, shape=latent),
        *(_over_batch(*asked, num_rows=num_rows) for asked in decoding.asked),
    ]


def _over_batch(draw: ReplayDraw, frame_axis: int, *, num_rows: int) -> ReplayDraw:
    """Returns a row's draw over a batch: rows stacked along a leading frame axis, else along a new one in front."""
    first, *rest = draw.shape
    return replace(draw, shape=(num_rows * first, *rest) if frame_axis == 0 else (num_rows, first, *rest))


def replay_rows(case: Case, script: Script) -> list[NoiseSource]:
    """Returns the rows' noise in a new repetition of the run."""
    replay = ReplayNoise(case.seed, script, num_rows=len(case.requests))
    rows = [replay.row(row) for row in range(len(case.requests))]
    if not any(isinstance(draw, ReplayDraw) and draw.stage == SOURCE_DRAW for draw in script):
        return rows
    return [RowNoise(row, replay.draw(SOURCE_DRAW, 0)[0]) for row in rows]
