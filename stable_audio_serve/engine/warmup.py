"""Measures a newly loaded model on typical shapes, so that the first prediction is already accurate; the measurements
also trigger lazy initialisation. Stops at the end of its time budget. Knows no requests of callers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from stable_audio_serve.core.clock import Clock
from stable_audio_serve.core.generation import GenerationRequest
from stable_audio_serve.engine.batching import BatchPolicy, Lane
from stable_audio_serve.engine.cost import CallCost, CostModel, Measurement, Work, fit_call_cost
from stable_audio_serve.engine.device import Device
from stable_audio_serve.models.protocol import (
    DecodeWindow,
    DiffusionModel,
    EncodeWindow,
    RowConditioning,
    RowPlan,
    StepBatch,
)
from stable_audio_serve.sampling.noise import NoiseSource

_PROMPT = "warm-up"
_DURATION_SHARES = (1 / 64, 1 / 16, 1 / 4, 1.0)  # of the model's maximum duration
_LONGEST_WINDOW = 128  # latent frames; beyond this the autoencoder's time is proportional


@dataclass(frozen=True, slots=True)
class _Probe:
    """A device call to time: its kind, its shape and a function that runs it."""

    work: Work
    rows: int
    frames: int
    run: Callable[[], object]


class WarmUp:
    """Fits `cost` to a model. Call `run` on the engine thread before the first request."""

    def __init__(
        self,
        model: DiffusionModel,
        cost: CostModel,
        *,
        policy: BatchPolicy,
        noise_factory: Callable[[int], NoiseSource],
        device: Device,
        clock: Clock,
        budget_s: float,
    ) -> None:
        self._model = model
        self._cost = cost
        self._policy = policy
        self._noise_factory = noise_factory
        self._device = device
        self._clock = clock
        self._budget_s = budget_s
        self._ends_at = 0.0
        self._measured: dict[Work, list[Measurement]] = {}

    def run(self) -> None:
        """Time probes from the smallest to the largest, except those predicted to exceed the budget."""
        self._ends_at = self._clock.monotonic() + self._budget_s
        text_ms = self._time(lambda: self._model.encode_text([_PROMPT]))
        self._measured["text"] = [Measurement(1, 0, text_ms)]
        prompt = self._model.encode_text([_PROMPT])[0]
        seen: set[int] = set()
        for share in _DURATION_SHARES:
            duration_s = self._model.spec.card.max_duration_s * share
            request = GenerationRequest(prompt=_PROMPT, duration_s=duration_s, seed=0, duration_padding_s=0.0)
            plan = self._model.plan(request)[0]
            if plan.frames in seen:
                continue
            seen.add(plan.frames)
            conditioning = self._model.condition(plan, prompt=prompt, negative=None, inpaint_latents=None)
            for probe in self._probes(plan, conditioning):
                self._measure(probe)
        for work, measurements in self._measured.items():
            self._cost.fit(work, measurements)

    def _probes(self, plan: RowPlan, conditioning: RowConditioning) -> Sequence[_Probe]:
        noise = self._noise_factory(0)
        spec = self._model.spec
        window = min(plan.frames, _LONGEST_WINDOW)
        latents = torch.zeros(spec.card.latent_channels, window, device=self._model.device)
        samples = torch.zeros(spec.card.channels, window * spec.hop)
        decode = DecodeWindow(latents, 0, noise)
        encode = EncodeWindow(samples, 0, "init", noise)
        crowds = ([Lane(1, plan.frames)], [Lane(2, plan.frames)], [Lane(2, plan.frames)] * 2)
        calls = [self._policy.split(lanes)[0] for lanes in crowds]
        shapes = sorted({(call.rows, call.frames) for call in calls})
        batches = [self._batch(plan, conditioning, rows=rows, frames=frames) for rows, frames in shapes]
        probes = [
            _Probe("denoise", rows, frames, partial(self._model.denoise, batch))
            for (rows, frames), batch in zip(shapes, batches, strict=True)
        ]
        probes.append(_Probe("decode", 1, window, partial(self._model.decode, [decode])))
        probes.append(_Probe("encode", 1, window, partial(self._model.encode_audio, [encode])))
        return probes

    def _batch(self, plan: RowPlan, conditioning: RowConditioning, *, rows: int, frames: int) -> StepBatch:
        device = self._model.device
        valid = (torch.arange(frames) < plan.valid_frames).expand(rows, frames).to(device)
        return StepBatch.of(
            torch.zeros(rows, self._model.spec.card.latent_channels, frames, device=device),
            t=torch.full((rows,), 0.5, device=device),
            valid=valid,
            branches=[conditioning.conditional] * rows,
        )

    def _measure(self, probe: _Probe) -> None:
        measured = self._measured.setdefault(probe.work, [])
        known = any((m.rows, m.frames) == (probe.rows, probe.frames) for m in measured)
        if known or not self._fits(measured, probe):
            return
        measured.append(Measurement(probe.rows, probe.frames, self._time(probe.run)))

    def _fits(self, measured: Sequence[Measurement], probe: _Probe) -> bool:
        if not measured:
            return True
        fitted: CallCost = fit_call_cost(measured)
        predicted_s = 2 * fitted.call_ms(probe.rows, probe.frames) / 1000.0
        return self._clock.monotonic() + predicted_s <= self._ends_at

    def _time(self, run: Callable[[], object]) -> float:
        """Returns the milliseconds of the second of two runs; the first may include initialisation."""
        run()
        began = self._device.mark()
        run()
        ended = self._device.mark()
        ended.wait()
        return ended.ms_since(began)
