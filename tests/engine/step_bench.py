"""Run single sampling steps of a model without an engine."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stable_audio_serve.core.clock import SystemClock
from stable_audio_serve.core.generation import GenerationRequest
from stable_audio_serve.engine.calls.conditioning import ConditioningArena
from stable_audio_serve.engine.calls.step import Memories, StepRow, StepShape, run_step
from stable_audio_serve.engine.hardware.arena import FrameArena, HeldFrames
from stable_audio_serve.engine.hardware.device import Device
from stable_audio_serve.models.protocol import DiffusionModel
from stable_audio_serve.sampling.update import StepNumbers
from tests.factories import make_audio, make_request

NETWORK_ROWS, PADDED = 16, 128
DEVICE = Device(torch.device("cpu"), clock=SystemClock())
REQUESTS = {
    "plain": (make_request(duration_s=0.9, seed=1), make_request(duration_s=0.3, seed=2, sampler="euler")),
    "guided": (
        make_request(duration_s=0.5, seed=3, cfg_scale=4.0, apg_scale=0.5, cfg_norm_threshold=1.0),
        make_request(duration_s=0.9, seed=4, cfg_scale=2.0, negative_prompt="hiss", cfg_rescale=0.3),
        make_request(duration_s=0.2, seed=5),
    ),
    "other guidance": (
        make_request(duration_s=0.7, seed=6, cfg_scale=7.0),
        make_request(duration_s=0.4, seed=7, sampler="euler", cfg_scale=3.0),
    ),
    "edited": (
        make_request(duration_s=0.6, seed=21, inpaint_audio=make_audio(0.6), inpaint_regions_s=((0.2, 0.4),)),
        make_request(duration_s=0.8, seed=22),
    ),
    "many registers": (make_request(duration_s=0.6, seed=8, sampler="dpmpp"), make_request(seed=9, sampler="rk4")),
}


class Bench:
    """Memory for the latents (registers) and conditioning values of one model's rows. Creates rows in this memory."""

    def __init__(self, model: DiffusionModel) -> None:
        self.model = model
        self.registers = FrameArena(model.spec.card.latent_channels, device=model.device, num_pages=512)
        self.conditioning = ConditioningArena(DEVICE)
        self._generator = torch.Generator().manual_seed(0)

    @property
    def memories(self) -> Memories:
        return Memories(
            self.registers.memory,
            {name: arena.memory for name, arena in self.conditioning.slots.items()},
            {name: arena.memory for name, arena in self.conditioning.frames.items()},
        )

    def rows(self, requests: Sequence[GenerationRequest], *, evaluation: int) -> list[StepRow]:
        return [self._row(request, evaluation) for request in requests]

    def shape(self, rows: Sequence[StepRow]) -> StepShape:
        channels = self.model.spec.card.latent_channels
        return StepShape.of(rows, network_rows=NETWORK_ROWS, frames=PADDED, latent_channels=channels)

    def step(self, shape: StepShape, buffer: Tensor) -> None:
        run_step(self.model.denoise, buffer, memories=self.memories, shape=shape)

    def results(self, rows: Sequence[StepRow]) -> list[bytes]:
        pages = [[page for part in row.held.parts for page in part] for row in rows]
        return [self.registers.memory[own].numpy().tobytes() for own in pages]

    def _row(self, request: GenerationRequest, evaluation: int) -> StepRow:
        plan = self.model.plan(request)[0]
        prompts = [text for text in (plan.prompt, plan.negative_prompt) if text is not None]
        prompt, *negative = self.model.encode_text(prompts)
        channels = self.model.spec.card.latent_channels
        source = None
        if plan.inpaint_source is not None:
            source = torch.randn(channels, plan.frames, generator=self._generator)
        conditioning = self.conditioning.hold(
            self.model.condition(
                plan, prompt=prompt, negative=negative[0] if negative else None, inpaint_latents=source
            )
        )
        held = HeldFrames.take(self.registers, frames=plan.frames, num_parts=plan.sampler.num_registers)
        for part in held.parts:
            values = torch.zeros(channels, len(part) * 64)
            values[:, : plan.frames] = torch.randn(channels, plan.frames, generator=self._generator)
            self.registers.memory[list(part)] = values.unflatten(1, (-1, 64)).movedim(1, 0)
        now = plan.sampler.evaluations[evaluation]
        branches = [conditioning.conditional]
        if now.guided:
            assert conditioning.unconditional is not None
            branches.append(conditioning.unconditional)
        return StepRow(
            StepNumbers.of(now),
            plan.guidance,
            guided=now.guided,
            valid_frames=plan.valid_frames,
            num_registers=plan.sampler.num_registers,
            held=held,
            branches=branches,
            noise=torch.randn(channels, plan.frames, generator=self._generator) if any(now.c) else None,
            draws=any(each.draws_noise for each in plan.sampler.evaluations),
        )


def tensors_of(memories: Memories) -> list[Tensor]:
    """Returns all tensors of `memories`, always in the same order."""
    return [memories.registers, *memories.constants.values(), *memories.by_frame.values()]
