"""Repeats a run of the reference in the engine, with the reference's random draws. Returns its latents and audio.

The reference's arguments become one request per row of its batch. A run with an unknown argument is skipped, because
without that argument it would be a different run.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stable_audio_serve.core.catalog import ModelCard
from stable_audio_serve.core.errors import CheckpointError
from stable_audio_serve.core.generation import GenerationRequest, GenerationResult, SourceAudio
from stable_audio_serve.engine import Engine, EngineOptions
from stable_audio_serve.models.forwarding import ForwardingModel
from stable_audio_serve.models.protocol import (
    DecodeWindow,
    DiffusionModel,
    EncodeWindow,
    ModelSpec,
    RowPlan,
    StepBatch,
    TextEmbedding,
)
from stable_audio_serve.models.sa3.lengths import plan_length
from stable_audio_serve.models.sa3.model import Sa3Model
from stable_audio_serve.models.windows import whole_window
from stable_audio_serve.sampling import NoiseSource, ReplayDraw, ReplayNoise, SeededNoise
from stable_audio_serve.sampling.samplers import DATA_DEPENDENT
from stable_audio_serve.verification.goldens import Goldens
from stable_audio_serve.verification.samplers import Calls, Script, sampler_script

# The draw for encoding a source in the Stable Audio Open family, where the reference encodes a source in one piece.
SOURCE_DRAW = "init/bottleneck"

# Arguments that the references' generate() adds to a case of the Stable Audio Open family, by objective.
_V_DEFAULTS = {"cfg_scale": 6.0, "sampler_type": "dpmpp-2m-sde", "sigma_min": 0.01, "sigma_max": 100.0}
_FLOW_DEFAULTS = {"cfg_scale": 6.0, "sampler_type": "euler"}

# The reference's argument -> our field: for all rows, for arguments with an optional list of one value per row, and for
# the conditioning of a row.
_FIELDS = {
    **{name: name for name in ("steps", "cfg_scale", "cfg_interval", "cfg_norm_threshold", "apg_scale")},
    **{name: name for name in ("sigma_min", "sigma_max", "init_noise_level", "chunked_decode")},
    "scale_phi": "cfg_rescale",
    "sampler_type": "sampler",
    "duration_padding_sec": "duration_padding_s",
}
_LISTED = {"prompt": "prompt", "negative_prompt": "negative_prompt", "duration": "duration_s"}
_ROW = {"prompt": "prompt", "seconds_start": "start_s", "seconds_total": "conditioned_total_s"}
_NEGATIVE = {"prompt": "negative_prompt", "seconds_start": "negative_start_s", "seconds_total": "negative_total_s"}
_REGIONS = ("inpaint_mask_start_seconds", "inpaint_mask_end_seconds")
_READ = ("batch_size", "sample_size", "seed", "conditioning", "negative_conditioning", "init_audio", "inpaint_audio")
_KNOWN = {*_FIELDS, *_LISTED, *_REGIONS, *_READ}


class Case(NamedTuple):
    """One run of a reference."""

    requests: tuple[GenerationRequest, ...]  # one per row; the seed of each is its row index
    seed: int  # of the run
    sample_size: int  # number of audio samples that caps the latent length


def skip_reason(args: Mapping[str, Any]) -> str | None:
    """Returns why a case cannot be repeated here, or None if it can."""
    unknown = {name for name, value in args.items() if name not in _KNOWN and value is not None}
    for row in (*args.get("conditioning", ()), *(args.get("negative_conditioning") or ())):
        unknown |= row.keys() - _ROW
    if unknown:
        return f"arguments nothing is known about: {', '.join(sorted(unknown))}"
    if args.get("sampler_type") in DATA_DEPENDENT:
        return f"{args['sampler_type']} chooses its steps from the data"
    return "its seed is random" if int(args.get("seed", -1)) < 0 else None


def parse_case(facts: Mapping[str, Any], *, goldens: Goldens, chunked: bool) -> Case:
    """Returns a case of Stable Audio 3, with defaults from the goldens and the model's default for chunked decoding.

    Raises CheckpointError if a list has another number of values than the batch has rows.
    """
    args: dict[str, Any] = {"prompt": "", "batch_size": 1, "chunked_decode": chunked}
    for stated in (goldens.section("generate_defaults"), facts["args"]):
        args |= {key: value for key, value in stated.items() if value is not None}
    columns = [_as_list(args[key], int(args["batch_size"])) for key in _LISTED if key in args]
    fields = [field for key, field in _LISTED.items() if key in args]
    rows = [dict(zip(fields, row, strict=True)) for row in zip(*columns, strict=True)]
    starts, ends = (value if isinstance(value := args.get(edge, []), list) else [value] for edge in _REGIONS)
    requests = _build_requests(
        args,
        rows,
        edit_schedule="reference",
        init_audio=_source(args.get("init_audio"), goldens),
        inpaint_audio=_source(args.get("inpaint_audio"), goldens),
        inpaint_regions_s=tuple(zip(starts, ends, strict=True)),
        keep="model",
    )
    return Case(requests, int(args["seed"]), int(args["sample_size"]))


def parse_open_case(facts: Mapping[str, Any], *, goldens: Goldens, card: ModelCard) -> Case:
    """Returns a case of the Stable Audio Open family. Raises ValueError unless each row has one condition."""
    is_v, inputs = card.objective == "v", facts.get("inputs")
    args = {**(_V_DEFAULTS if is_v else _FLOW_DEFAULTS), **facts["args"]}
    negatives = args.get("negative_conditioning") or [{}]
    negatives = negatives * len(args["conditioning"]) if len(negatives) == 1 else negatives
    pairs = zip(args["conditioning"], negatives, strict=True)
    requests = _build_requests(
        args,
        [_renamed(row, _ROW) | _renamed(negative, _NEGATIVE) for row, negative in pairs],
        duration_s=int(args["sample_size"]) / card.sample_rate_hz,
        init_audio=SourceAudio(goldens[inputs["init_audio"]].numpy(), int(inputs["init_rate"])) if inputs else None,
        edit_schedule=None if is_v else "reference",
    )
    return Case(requests, int(args["seed"]), int(args["sample_size"]))


def _build_requests(
    args: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], **shared: Any
) -> tuple[GenerationRequest, ...]:
    """Returns one request per row, from the fields that all rows share and the fields of the row."""
    shared |= _renamed(args, _FIELDS)
    return tuple(GenerationRequest(**shared, **row, seed=index) for index, row in enumerate(rows))


def _renamed(args: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Returns the arguments that are present and not None, under our names."""
    found = {ours: args[theirs] for theirs, ours in names.items() if args.get(theirs) is not None}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}


def _as_list(value: Any, length: int) -> list[Any]:
    found = value if isinstance(value, list) else [value] * length
    if len(found) != length:
        raise CheckpointError(f"golden.json: a list of {len(found)} values for a batch of {length}")
    return found


def _source(found: Mapping[str, Any] | None, goldens: Goldens) -> SourceAudio | None:
    if found is None:
        return None
    return SourceAudio(torch.atleast_2d(goldens[found["tensor"]]).numpy(), int(found["sample_rate"]))


class CallOrderNoise(SeededNoise):
    """Noise whose draws for windows follow the order of the calls, as in the reference."""

    def window(
        self, stage: str, start: int, *, shape: tuple[int, ...], frame_axis: int, device: torch.device
    ) -> Tensor:
        return self.step(shape).to(device)


class RowNoise:
    """A row's noise from `source`, except inside the autoencoder: there it is part of `drawn` (D, F), or zeros.

    `requested` lists the draws inside the autoencoder and the frame axis of each.
    """

    def __init__(self, source: NoiseSource, drawn: Tensor | None = None) -> None:
        self._source, self._drawn = source, drawn
        self.requested: list[tuple[ReplayDraw, int]] = []

    def initial(self, shape: tuple[int, ...]) -> Tensor:
        return self._source.initial(shape)

    def step(self, shape: tuple[int, ...]) -> Tensor:
        return self._source.step(shape)

    def window(
        self, stage: str, start: int, *, shape: tuple[int, ...], frame_axis: int, device: torch.device
    ) -> Tensor:
        self.requested.append((ReplayDraw(stage, start, shape), frame_axis))
        if self._drawn is None:
            return torch.zeros(shape, device=device)
        return self._drawn.narrow(frame_axis, start, shape[frame_axis]).to(device)


class RowResult(NamedTuple):
    """One row of a run: its plan, final latents (D, F), and audio (C, S) cut to the row's length."""

    plan: RowPlan
    latents: Tensor
    audio: Tensor
    calls: Calls  # the network's input and output of each call of the run; a guided row is in it twice, unguided second


class ObservedModel(ForwardingModel):
    """Wraps a model to record its calls and the final latents of each row. Decodes the whole row, headroom included.

    `noise` has one source per row. If `texts` has entries, they replace the text encoder.
    """

    def __init__(
        self, model: DiffusionModel, *, noise: Sequence[NoiseSource], texts: Mapping[str, TextEmbedding]
    ) -> None:
        super().__init__(model)
        self._noise, self._texts = noise, texts
        self.latents: list[dict[int, Tensor]] = [{} for _ in noise]  # per row: frame -> latent (D,)
        self.calls: list[tuple[Tensor, Tensor]] = []

    @property
    def spec(self) -> ModelSpec:
        return replace(super().spec, captures_decode=False)  # a CUDA graph would bypass `decode` below

    def plan(self, request: GenerationRequest, *, frames: int | None = None) -> tuple[RowPlan, ...]:
        plans = super().plan(request, frames=frames)
        return tuple(replace(plan, output_samples=plan.frames * self.spec.hop) for plan in plans)

    def encode_text(self, prompts: Sequence[str]) -> list[TextEmbedding]:
        return [self._texts[prompt] for prompt in prompts] if self._texts else super().encode_text(prompts)

    def denoise(self, batch: StepBatch) -> Tensor:
        self.calls.append((batch.x, super().denoise(batch)))
        return self.calls[-1][1]

    def decode(self, windows: Sequence[DecodeWindow]) -> list[Tensor]:
        for window in windows:
            row = next((row for row, noise in enumerate(self._noise) if noise is window.noise), None)
            if row is not None:
                self.latents[row] |= dict(enumerate(window.latents.cpu().unbind(1), window.start))
        return super().decode(windows)


def run_case(
    model: DiffusionModel, case: Case, *, noise: Sequence[NoiseSource], texts: Mapping[str, TextEmbedding] | None = None
) -> list[RowResult]:
    """Run all rows of a case in one batch. `noise` has one source per row; `texts` replace the text encoder."""
    plans, observed = plan_case(model, case), ObservedModel(model, noise=noise, texts=texts or {})

    async def generate() -> list[GenerationResult]:
        options = EngineOptions(warmup_budget_s=0.0, max_queue_s=1e9)
        async with Engine(observed, options, noise_factory=lambda seed: noise[seed]) as engine:
            return await asyncio.gather(*(engine.generate(row, frames=plans[0].frames) for row in case.requests))

    results = []
    for plan, result, latents in zip(plans, asyncio.run(generate()), observed.latents, strict=True):
        made = torch.stack([latents[frame] for frame in range(plan.frames)], dim=1)
        audio = torch.from_numpy(result.audio[0])[:, : plan.output_samples]
        results.append(RowResult(plan, made, audio, observed.calls))
    return results


def plan_case(model: DiffusionModel, case: Case) -> list[RowPlan]:
    """Returns one plan per row. All have the latent length of the longest row, headroom included.

    In the Stable Audio Open family the latent length depends on the sample size only, not on the duration.
    """
    frames = case.sample_size // model.spec.hop
    if isinstance(model, Sa3Model):
        rule = replace(model.config.lengths, max_samples=case.sample_size)
        longest_s = max(request.duration_s for request in case.requests)
        frames = plan_length(longest_s, rule, padding_s=case.requests[0].duration_padding_s or 0.0).frames
    return [model.plan(request, frames=frames)[0] for request in case.requests]


def draw_script(model: DiffusionModel, case: Case) -> Script:
    """Returns the reference's draws in order: start noise, source windows, sampler steps, decode windows.

    Runs encoder and decoder on silence to record which draws each window requests. The reference encodes a source once
    for all rows.
    """
    plan, hop, num_rows = plan_case(model, case)[0], model.spec.hop, len(case.requests)
    latent = (num_rows, model.spec.card.latent_channels, plan.frames)
    encoding, decoding = RowNoise(SeededNoise(0)), RowNoise(SeededNoise(0))
    for stage, source in (("init", plan.init_source), ("inpaint", plan.inpaint_source)):
        if source is not None:
            for span in source.windows if isinstance(model, Sa3Model) else whole_window(plan.frames):
                silence = torch.zeros(model.spec.card.channels, (span.stop - span.start) * hop)
                model.encode_audio([EncodeWindow(silence, span.start, stage, encoding)])
    for span in plan.decode_windows:
        zeros = torch.zeros(latent[1], span.stop - span.start, device=model.device)
        model.decode([DecodeWindow(zeros, span.start, decoding)])
    return [
        ReplayDraw("initial", 0, latent),
        *(_over_batch(*requested, num_rows=1) for requested in encoding.requested),
        *sampler_script(case.requests[0].sampler or "", plan.sampler, shape=latent),
        *(_over_batch(*requested, num_rows=num_rows) for requested in decoding.requested),
    ]


def _over_batch(draw: ReplayDraw, frame_axis: int, *, num_rows: int) -> ReplayDraw:
    """Returns the draw for a batch: stacked along axis 0 if that is the frame axis, else along a new axis 0."""
    first, *rest = draw.shape
    return replace(draw, shape=(num_rows * first, *rest) if frame_axis == 0 else (num_rows, first, *rest))


def replay_rows(case: Case, script: Script) -> list[NoiseSource]:
    """Returns one noise source per row that replays the draws of `script`."""
    replay = ReplayNoise(case.seed, script, num_rows=len(case.requests))
    rows = [replay.row(row) for row in range(len(case.requests))]
    if not any(isinstance(draw, ReplayDraw) and draw.stage == SOURCE_DRAW for draw in script):
        return rows
    return [RowNoise(row, replay.draw(SOURCE_DRAW, 0)[0]) for row in rows]
