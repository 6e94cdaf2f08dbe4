"""The reference's random draws of a run in its order: start noise, source windows, sampler steps, decode windows.

A window's draws are recorded by running the model, so that nothing here depends on a family or on stored lists.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stable_audio_serve.models.protocol import DecodeWindow, DiffusionModel, EncodeWindow, RowPlan
from stable_audio_serve.sampling import NoiseSource, ReplayDraw


@dataclass(frozen=True, slots=True)
class WindowDraw:
    """One draw that a row makes in a window: `stage`, its `shape` for one row, and the axis that counts frames."""

    stage: str
    shape: tuple[int, ...]
    frame_axis: int

    def over_batch(self, num_rows: int) -> tuple[int, ...]:
        """Returns the shape over a batch: rows stacked along a leading frame axis, else along a new one in front."""
        if self.frame_axis == 0:
            return (num_rows * self.shape[0], *self.shape[1:])
        return (num_rows, *self.shape)


class DrawProbe:
    """Records which draws a model makes in a window, by running a silent one of each length once."""

    def __init__(self, model: DiffusionModel) -> None:
        self._model = model
        self._known: dict[tuple[str, int], list[WindowDraw]] = {}

    def draws(self, stage: str, num_frames: int) -> list[WindowDraw]:
        """Returns the draws of a window of `num_frames` latents; `stage` is init, inpaint or decode."""
        if (stage, num_frames) not in self._known:
            recorder = _Recorder()
            spec, device = self._model.spec, self._model.device
            if stage == "decode":
                latents = torch.zeros(spec.card.latent_channels, num_frames, device=device)
                self._model.decode([DecodeWindow(latents=latents, start=0, noise=recorder)])
            else:
                samples = torch.zeros(spec.card.channels, spec.hop * num_frames)
                self._model.encode_audio([EncodeWindow(samples=samples, start=0, stage=stage, noise=recorder)])
            self._known[stage, num_frames] = recorder.asked
        return self._known[stage, num_frames]


def replay_script(plan: RowPlan, probe: DrawProbe, *, latent_channels: int, num_rows: int) -> list[ReplayDraw]:
    """Returns the draws of a run over `num_rows` rows planned like `plan`; a source is encoded once for all of them."""
    latent = (num_rows, latent_channels, plan.frames)
    script = [ReplayDraw("initial", 0, latent)]
    for stage, source in (("init", plan.init_source), ("inpaint", plan.inpaint_source)):
        for span in source.windows if source else ():
            draws = probe.draws(stage, span.stop - span.start)
            script += [ReplayDraw(draw.stage, span.start, draw.shape) for draw in draws]
    num_steps = sum(evaluation.draws_noise for evaluation in plan.sampler.evaluations)
    script += [ReplayDraw("step", step, latent) for step in range(num_steps)]
    for span in plan.decode_windows:
        draws = probe.draws("decode", span.stop - span.start)
        script += [ReplayDraw(draw.stage, span.start, draw.over_batch(num_rows)) for draw in draws]
    return script


class SilentWindows:
    """A row's noise with none inside the autoencoder, for runs that were made without drawing it."""

    def __init__(self, source: NoiseSource) -> None:
        self._source = source

    def initial(self, shape: tuple[int, ...]) -> Tensor:
        return self._source.initial(shape)

    def step(self, shape: tuple[int, ...]) -> Tensor:
        return self._source.step(shape)

    def window(
        self, stage: str, start: int, *, shape: tuple[int, ...], frame_axis: int, device: torch.device
    ) -> Tensor:
        return torch.zeros(shape, device=device)


class _Recorder:
    """Zeros instead of noise; records what was drawn."""

    def __init__(self) -> None:
        self.asked: list[WindowDraw] = []

    def initial(self, shape: tuple[int, ...]) -> Tensor:
        return torch.zeros(shape)

    step = initial

    def window(
        self, stage: str, start: int, *, shape: tuple[int, ...], frame_axis: int, device: torch.device
    ) -> Tensor:
        self.asked.append(WindowDraw(stage, shape, frame_axis))
        return torch.zeros(shape, device=device)
