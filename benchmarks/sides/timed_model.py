"""A model whose calls take the time that a `DeviceModel` says, by sleeping: the real engine and its rivals run on it
as they would on a device of that speed, with two idle cores to spare. Text to audio only.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.simulate.devices import DeviceModel
from stable_audio_serve.core.catalog import SA3_FAMILY, ModelCard
from stable_audio_serve.core.errors import InvalidRequestError
from stable_audio_serve.core.generation import GenerationRequest
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
from stable_audio_serve.models.windows import whole_window
from stable_audio_serve.sampling.plan import Guidance
from stable_audio_serve.sampling.samplers import build_plan
from stable_audio_serve.sampling.schedules import DEFAULT_SHIFT, build_sigmas

_RATE_HZ, _HOP = 689, 64  # as many latent frames per second as Stable Audio 3, but little audio
_CHANNELS = 2


class TimedModel:
    """Implements DiffusionModel. What it makes depends on prompt, seed and every step, and on no neighbour."""

    def __init__(
        self, times: DeviceModel, *, max_duration_s: float = 120.0, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        """`sleep` takes seconds."""
        self._times = times
        self._sleep = sleep
        self.device = torch.device("cpu")
        self.spec = ModelSpec(
            card=ModelCard(
                "timed",
                SA3_FAMILY,
                sample_rate_hz=_RATE_HZ,
                channels=_CHANNELS,
                latent_channels=_CHANNELS,
                max_duration_s=max_duration_s,
                default_duration_padding_s=0.0,
            ),
            hop=_HOP,
            max_frames=math.ceil(max_duration_s * _RATE_HZ / _HOP),
            default_sampler="pingpong",
            noisy_source_encoder=False,
        )

    def plan(self, request: GenerationRequest, *, frames: int | None = None) -> tuple[RowPlan, ...]:
        if request.init_audio is not None or request.inpaint_audio is not None:
            raise InvalidRequestError("this model edits nothing", field="init_audio")
        card = self.spec.card
        length = frames or min(math.ceil(request.duration_s * _RATE_HZ / _HOP), self.spec.max_frames)
        guidance = Guidance(
            cfg_scale=card.default_cfg_scale if request.cfg_scale is None else request.cfg_scale,
            apg_scale=1.0,
            norm_threshold=0.0,
            rescale=0.0,
            interval=request.cfg_interval,
        )
        steps = request.steps or card.default_steps
        sampler = build_plan(
            request.sampler or self.spec.default_sampler,
            build_sigmas(steps, DEFAULT_SHIFT, length=length),
            guidance=guidance,
            has_source=False,
        )
        return tuple(
            RowPlan(
                seed=seed,
                frames=length,
                valid_frames=length,
                output_samples=int(request.duration_s * _RATE_HZ),
                prompt=request.prompt,
                negative_prompt=None,
                numbers={},
                sampler=sampler,
                guidance=guidance,
                init_source=None,
                inpaint_source=None,
                keep_mask=None,
                decode_windows=whole_window(length),
            )
            for seed in request.seeds
        )

    def encode_text(self, prompts: Sequence[str]) -> list[TextEmbedding]:
        self._take(self._times.text_ms(len(prompts)))
        mask = torch.ones(1, dtype=torch.bool)
        return [TextEmbedding(prompt, torch.tensor([[_tone(prompt)]]), mask) for prompt in prompts]

    def encode_audio(self, windows: Sequence[EncodeWindow]) -> list[Tensor]:
        self._take(self._times.encode_ms(len(windows), windows[0].samples.shape[-1] // _HOP))
        return [window.samples.reshape(_CHANNELS, -1, _HOP).mean(dim=-1) for window in windows]

    def condition(
        self, plan: RowPlan, *, prompt: TextEmbedding, negative: TextEmbedding | None, inpaint_latents: Tensor | None
    ) -> RowConditioning:
        guided = any(evaluation.guided for evaluation in plan.sampler.evaluations)
        conditional = BranchConditioning({"tone": prompt.tokens[0, 0]})
        return RowConditioning(conditional, BranchConditioning({}) if guided else None)

    def denoise(self, batch: StepBatch) -> Tensor:
        self._take(self._times.step_ms(len(batch.x), batch.x.shape[-1]))
        tones = batch.constants["tone"]
        return torch.tanh(2.0 * batch.x) * (0.5 + batch.t)[:, None, None] + tones[:, None, None]

    def decode(self, windows: Sequence[DecodeWindow]) -> list[Tensor]:
        self._take(self._times.decode_ms(len(windows), windows[0].latents.shape[-1]))
        return [0.2 * window.latents.repeat_interleave(_HOP, dim=-1) for window in windows]

    def _take(self, ms: float) -> None:
        self._sleep(ms / 1000.0)


def _tone(prompt: str) -> float:
    """Returns a number in 0..1 that another prompt hardly shares."""
    return sum(prompt.encode()) % 101 / 101
