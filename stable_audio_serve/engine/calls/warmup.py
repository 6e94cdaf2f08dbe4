"""Times a newly loaded model on typical call shapes, so that the time of the first request can already be predicted.
The runs also trigger lazy initialisation. The warm-up stops when its time budget is used up.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from stable_audio_serve.engine.calls.coding_calls import captured_windows
from stable_audio_serve.engine.hardware.device import Device
from stable_audio_serve.engine.scheduling.batching import BatchPolicy, Call, Lane
from stable_audio_serve.engine.scheduling.cost import CostModel, Measurement, Work
from stable_audio_serve.engine.scheduling.memory import example_batch, example_conditioning, plan_share
from stable_audio_serve.models.protocol import (
    BranchConditioning,
    DecodeWindow,
    DiffusionModel,
    EncodeWindow,
    RowPlan,
    StepBatch,
    TextEmbedding,
)
from stable_audio_serve.models.segments import Segments
from stable_audio_serve.models.windows import window_lengths
from stable_audio_serve.sampling.noise import NoiseSource

log = logging.getLogger(__name__)

_PROMPT = "warm-up"
DURATION_SHARES = (1 / 64, 1 / 16, 1 / 4, 1.0)  # clip durations to time, as shares of the model's longest duration
_COUNTS = (1, 2, 4, 8, 32)  # batch sizes to time, both of denoising steps and of text encoder calls
_MOST_QUEUEING_S = 0.1  # of one call
_NUM_RUNS = 3  # most runs of each shape; the shortest time counts, because other programs only make a run longer
_ENOUGH_S = 0.1  # if two runs have taken this long, there is no third one: short delays change long runs little


def step_calls(policy: BatchPolicy, frames: int, *, max_tokens: int) -> list[Call]:
    """Return the denoiser calls to time for clips of `frames` latent frames.

    There is a call for one clip, one for a guided clip, and one for each number of clips in `_COUNTS` that has at most
    `max_tokens` latent frames in total.
    """
    groups = [[Lane(1, frames)], [Lane(2, frames)]]
    groups += [[Lane(1, frames)] * count for count in _COUNTS if count * policy.padded(frames) <= max_tokens]
    return [policy.split(lanes)[0] for lanes in groups]


@dataclass(frozen=True, slots=True)
class _Probe:
    """A device call to time: its kind, its shape and a function that runs it."""

    work: Work
    rows: int
    frames: int
    run: Callable[[], object]

    @property
    def size(self) -> int:
        """The batch size times the frames. Apart from attention, a call's time grows at most linearly with this."""
        return self.rows * max(self.frames, 1)


class WarmUp:
    """Measures how long a model's calls take and fits `cost` to the times.

    Call `run` on the engine thread before the first request.
    """

    def __init__(
        self,
        model: DiffusionModel,
        cost: CostModel,
        *,
        policy: BatchPolicy,
        max_tokens: int,
        max_prompts: int,
        noise_factory: Callable[[int], NoiseSource],
        device: Device,
        budget_s: float,
    ) -> None:
        """`max_tokens` limits the latent frames of all rows of a step together. `max_prompts` limits the prompts of a
        text encoder call.
        """
        self._model = model
        self._cost = cost
        self._policy = policy
        self._max_tokens = max_tokens
        self._max_prompts = max_prompts
        self._noise_factory = noise_factory
        self._device = device
        self._left_s = budget_s
        self._measured: dict[Work, list[Measurement]] = {}

    def run(self) -> None:
        """Time the call shapes from the smallest to the largest, and fit the cost model to the times.

        Shapes that are predicted to exceed the rest of the time budget are skipped.
        """
        prompt = self._model.encode_text([_PROMPT])[0]
        if self._model.spec.is_compiled:
            self._compile()
        probes = {(probe.work, probe.rows, probe.frames): probe for probe in self._probes(prompt)}
        last: dict[Work, tuple[float, int]] = {}  # for each kind of call: time in ms and size of the last one timed
        for probe in sorted(probes.values(), key=lambda probe: (probe.size, probe.rows)):
            if probe.work in last:
                ms, size = last[probe.work]
                if ms * probe.size / size > 1000.0 * self._left_s:
                    continue
            elif probe.work != "text":
                # The first run of each kind includes lazy initialisation, so it is neither measured nor taken from the
                # budget. The first run of the text encoder was `prompt`.
                self._run_once(probe)
            try:
                ms = self._best_ms(probe)
            except torch.OutOfMemoryError:  # the scheduler does not start rows that would need such a large call
                log.info("warm-up: no memory for %d rows of %d frames", probe.rows, probe.frames)
                torch.cuda.empty_cache()
                continue
            last[probe.work] = ms, probe.size
            self._measured.setdefault(probe.work, []).append(Measurement(probe.rows, probe.frames, ms))
        for work, measurements in self._measured.items():
            self._cost.fit(work, measurements)

    def _compile(self) -> None:
        """Run each denoiser call that torch.compile compiles separately: batches of one and of two, each with and
        without a source to inpaint.
        """
        plan = plan_share(self._model, DURATION_SHARES[0])
        for branch in example_conditioning(self._model, plan):
            for rows in (1, 2):
                self._denoise(plan, branch, rows=rows, frames=self._policy.padded(plan.frames))

    def _probes(self, prompt: TextEmbedding) -> Iterator[_Probe]:
        for count in _COUNTS:
            if count <= self._max_prompts:
                yield _Probe("text", count, 0, partial(self._model.encode_text, [_PROMPT] * count))
        for share in DURATION_SHARES:
            plan = plan_share(self._model, share)
            conditioning = self._model.condition(plan, prompt=prompt, negative=None, inpaint_latents=None)
            yield from self._row_probes(plan, conditioning.conditional)

    def _row_probes(self, plan: RowPlan, branch: BranchConditioning) -> Iterator[_Probe]:
        noise = self._noise_factory(0)
        for call in step_calls(self._policy, plan.frames, max_tokens=self._max_tokens):
            ((rows, frames),) = call.groups
            run: Callable[[], object]
            if call.tokens:
                run = partial(self._model.denoise, self._packed_batch(call, plan=plan, branch=branch))
            else:
                run = partial(self._denoise, plan, branch, rows=rows, frames=frames)
            yield _Probe("denoise", rows, frames, run)
        spec = self._model.spec
        window = max(window_lengths(plan.decode_windows))
        latents = torch.zeros(spec.card.latent_channels, window, device=self._model.device)
        samples = torch.zeros(spec.card.channels, window * spec.hop)
        yield _Probe("decode", 1, window, partial(self._model.decode, [DecodeWindow(latents, 0, noise)]))
        encode = EncodeWindow(samples, 0, "init", noise)
        yield _Probe("encode", 1, window, partial(self._model.encode_audio, [encode]))

    def _denoise(self, plan: RowPlan, branch: BranchConditioning, *, rows: int, frames: int) -> object:
        batch = example_batch(self._model, [branch] * rows, frames=frames, valid_frames=plan.valid_frames)
        return self._model.denoise(batch)

    def _packed_batch(self, call: Call, *, plan: RowPlan, branch: BranchConditioning) -> StepBatch:
        """Return the inputs of a packed call whose rows all have the same plan and conditioning."""
        spec, device = self._model.spec, self._model.device
        frames, valid = torch.zeros(2, call.rows, dtype=torch.int32)
        frames[: len(call.lengths)], valid[: len(call.lengths)] = plan.frames, plan.valid_frames
        return StepBatch(
            x=torch.zeros(1, spec.card.latent_channels, call.tokens, device=device),
            t=torch.full((call.rows,), 0.5, device=device),
            valid=None,
            constants={name: value[None] for name, value in branch.constants.items()},
            by_frame={name: value.new_zeros(1, len(value), call.tokens) for name, value in branch.by_frame.items()},
            segments=Segments.of(
                frames.to(device),
                valid.to(device),
                num_prefix=spec.num_prefix,
                num_tokens=call.tokens,
                longest_frames=call.frames,
            ),
            slots={name: torch.zeros(call.rows, dtype=torch.int32, device=device) for name in branch.constants},
        )

    def _best_ms(self, probe: _Probe) -> float:
        """Return the shortest time of up to three runs. After the first, runs that exceed the budget are skipped."""
        best_s = total_s = self._run_once(probe)
        self._left_s -= best_s
        # A CUDA graph does not wait for the host. Later runs of a call that is captured when it is repeated therefore
        # begin when the host has queued the whole call.
        is_captured = self._device.can_capture and self._can_capture(probe)
        queueing_s = min(best_s, _MOST_QUEUEING_S) if is_captured else 0.0
        for num_done in range(1, _NUM_RUNS):
            # At least two runs: on a GPU, the first run of a shape may also choose kernels.
            if (num_done > 1 and total_s >= _ENOUGH_S) or best_s + queueing_s > self._left_s:
                break
            if is_captured:
                self._device.occupy(queueing_s)
            run_s = self._run_once(probe)
            total_s += run_s
            self._left_s -= run_s + queueing_s
            best_s = min(best_s, run_s)
        return 1000.0 * best_s

    def _can_capture(self, probe: _Probe) -> bool:
        if probe.work == "decode":
            return self._model.spec.captures_decode and captured_windows(probe.rows, frames=probe.frames) > 0
        return probe.work == "denoise"

    def _run_once(self, probe: _Probe) -> float:
        """Return the device time of one run, in seconds."""
        began = self._device.mark()
        probe.run()
        ended = self._device.mark()
        ended.wait()
        return ended.ms_since(began) / 1000.0
