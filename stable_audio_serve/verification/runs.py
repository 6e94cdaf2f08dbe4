"""Checks of whole runs: repeats runs of the reference in the engine, with the reference's random draws.

The reference's arguments become one request per row of its batch. A run with an unknown argument is skipped, because
without that argument it would be a different run. Runs of the Stable Audio Open family use the stored text embeddings:
the reference's text encoder computes in float16, whose last bits differ between machines, and has separate checks.
"""

from __future__ import annotations

import asyncio
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stable_audio_serve.core.catalog import ModelCard
from stable_audio_serve.core.errors import CheckpointError
from stable_audio_serve.core.generation import GenerationRequest, GenerationResult, SourceAudio
from stable_audio_serve.engine import Engine, EngineOptions
from stable_audio_serve.models.protocol import (
    DecodeWindow,
    DiffusionModel,
    EncodeWindow,
    ModelSpec,
    RowPlan,
    StepBatch,
    TextEmbedding,
    WindowSpan,
)
from stable_audio_serve.models.sa3.lengths import plan_length
from stable_audio_serve.models.sa3.model import Sa3Model
from stable_audio_serve.models.sao.build import build_spec
from stable_audio_serve.models.sao.model import SaoComponents, SaoModel
from stable_audio_serve.models.windows import chunked_windows, whole_window
from stable_audio_serve.sampling.guidance import GuidanceBatch, guide
from stable_audio_serve.sampling.noise import NoiseSource, ReplayDraw, ReplayNoise, SeededNoise
from stable_audio_serve.sampling.samplers import DATA_DEPENDENT
from stable_audio_serve.verification import samplers
from stable_audio_serve.verification.checks import Check, Finding, Goldens, Subject, calls_of, same

SOURCE_DRAW = "init/bottleneck"  # the only draw of Stable Audio Open's reference when it encodes a source
_SILENT = "_ae_noise_off"  # suffix of outputs of a run without noise in the autoencoder
# Arguments that the references' generate() adds to a case of the Stable Audio Open family, by objective.
_V_DEFAULTS = {"cfg_scale": 6.0, "sampler_type": "dpmpp-2m-sde", "sigma_min": 0.01, "sigma_max": 100.0}
_FLOW_DEFAULTS = {"cfg_scale": 6.0, "sampler_type": "euler"}
# The reference's argument -> our field. `_FIELDS` are for all rows. An argument in `_LISTED` may be a list of one value
# per row. `_ROW` and `_NEGATIVE` are for the conditioning of one row.
_FIELDS = {"scale_phi": "cfg_rescale", "sampler_type": "sampler", "duration_padding_sec": "duration_padding_s"}
_FIELDS |= {name: name for name in ("steps", "cfg_scale", "cfg_interval", "cfg_norm_threshold", "apg_scale")}
_FIELDS |= {name: name for name in ("sigma_min", "sigma_max", "init_noise_level", "chunked_decode")}
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

    Raises CheckpointError if a list does not have one value per row of the batch.
    """
    args: dict[str, Any] = {"prompt": "", "batch_size": 1, "chunked_decode": chunked}
    for stated in (goldens.section("generate_defaults"), facts["args"]):
        args |= {key: value for key, value in stated.items() if value is not None}
    columns, size = {}, int(args["batch_size"])
    for key in [key for key in _LISTED if key in args]:
        columns[_LISTED[key]] = values = args[key] if isinstance(args[key], list) else [args[key]] * size
        if len(values) != size:
            raise CheckpointError(f"golden.json: a list of {len(values)} values for a batch of {size}")
    starts, ends = (value if isinstance(value := args.get(edge, []), list) else [value] for edge in _REGIONS)
    sources = {
        name: SourceAudio(torch.atleast_2d(goldens[args[name]["tensor"]]).numpy(), int(args[name]["sample_rate"]))
        for name in ("init_audio", "inpaint_audio")
        if name in args
    }
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    regions_s = tuple(zip(starts, ends, strict=True))
    return _build_case(args, rows, edit_schedule="reference", inpaint_regions_s=regions_s, keep="model", **sources)


def parse_open_case(facts: Mapping[str, Any], *, goldens: Goldens, card: ModelCard) -> Case:
    """Returns a case of the Stable Audio Open family.

    Raises ValueError if there are several negative conditions, but not exactly one for each row.
    """
    is_v, inputs = card.objective == "v", facts.get("inputs")
    args = {**(_V_DEFAULTS if is_v else _FLOW_DEFAULTS), **facts["args"]}
    negatives = args.get("negative_conditioning") or [{}]
    negatives = negatives * len(args["conditioning"]) if len(negatives) == 1 else negatives
    pairs = zip(args["conditioning"], negatives, strict=True)
    rows = [_renamed(row, _ROW) | _renamed(negative, _NEGATIVE) for row, negative in pairs]
    source = SourceAudio(goldens[inputs["init_audio"]].numpy(), int(inputs["init_rate"])) if inputs else None
    duration_s, schedule = int(args["sample_size"]) / card.sample_rate_hz, None if is_v else "reference"
    return _build_case(args, rows, duration_s=duration_s, init_audio=source, edit_schedule=schedule)


def _build_case(args: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], **shared: Any) -> Case:
    """Returns a case from its arguments, the fields of each row, and the fields that all rows share."""
    shared |= _renamed(args, _FIELDS)
    requests = tuple(GenerationRequest(**shared, **row, seed=index) for index, row in enumerate(rows))
    return Case(requests, int(args["seed"]), int(args["sample_size"]))


def _renamed(args: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Returns the arguments that are present and not None, renamed by `names` (the reference's name -> our name)."""
    found = {ours: args[theirs] for theirs, ours in names.items() if args.get(theirs) is not None}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}


class CallOrderNoise(SeededNoise):
    """Gives each window the next draw of noise, in the order of the calls. The reference draws in this order."""

    def window(
        self, stage: str, start: int, *, shape: tuple[int, ...], frame_axis: int, device: torch.device
    ) -> Tensor:
        return self.step(shape).to(device)


class RowNoise:
    """A row's noise. In the autoencoder it is each window's part of `drawn` (D, F), or zeros if `drawn` is None.

    The noise for sampling is from `source`.
    """

    def __init__(self, source: NoiseSource, drawn: Tensor | None = None, *, num_rows: int = 1) -> None:
        self.initial, self.step = source.initial, source.step
        self._drawn, self._num_rows = drawn, num_rows
        self.requested: list[ReplayDraw] = []  # draws inside the autoencoder, in their shapes for a batch of `num_rows`

    def window(
        self, stage: str, start: int, *, shape: tuple[int, ...], frame_axis: int, device: torch.device
    ) -> Tensor:
        batch = (self._num_rows * shape[0], *shape[1:]) if frame_axis == 0 else (self._num_rows, *shape)
        self.requested.append(ReplayDraw(stage, start, batch))
        if self._drawn is None:
            return torch.zeros(shape, device=device)
        return self._drawn.narrow(frame_axis, start, shape[frame_axis]).to(device)


class RowResult(NamedTuple):
    """One row of a run: its plan, final latents (D, F), and audio (C, S) cut to the row's length."""

    plan: RowPlan
    latents: Tensor
    audio: Tensor
    calls: samplers.Calls  # input and output of each network call: with guidance, conditional rows, then unconditional


class ObservedModel:
    """Wraps a model, and records its calls and each row's final latents, headroom included.

    If `texts` is not empty, it replaces the text encoder.
    """

    def __init__(self, model: DiffusionModel, texts: Mapping[str, TextEmbedding]) -> None:
        # Not `__getattr__`: from Python 3.12, `isinstance` with a protocol does not see what it passes on.
        self.device, self.condition, self.encode_audio = model.device, model.condition, model.encode_audio
        self._model = model
        self._texts = texts
        self.latents: dict[NoiseSource, dict[int, Tensor]] = defaultdict(dict)  # row's noise -> frame -> latent (D,)
        self.calls: list[tuple[Tensor, Tensor]] = []

    @property
    def spec(self) -> ModelSpec:
        return replace(self._model.spec, captures_decode=False)  # a CUDA graph would bypass `decode` below

    def plan(self, request: GenerationRequest, *, frames: int | None = None) -> tuple[RowPlan, ...]:
        plans = self._model.plan(request, frames=frames)
        return tuple(replace(plan, output_samples=plan.frames * self.spec.hop) for plan in plans)

    def encode_text(self, prompts: Sequence[str]) -> list[TextEmbedding]:
        return [self._texts[prompt] for prompt in prompts] if self._texts else self._model.encode_text(prompts)

    def denoise(self, batch: StepBatch) -> Tensor:
        self.calls.append((batch.x, self._model.denoise(batch)))
        return self.calls[-1][1]

    def decode(self, windows: Sequence[DecodeWindow]) -> list[Tensor]:
        for window in windows:
            self.latents[window.noise] |= dict(enumerate(window.latents.cpu().unbind(1), window.start))
        return self._model.decode(windows)


def run_case(
    model: DiffusionModel, case: Case, *, noise: Sequence[NoiseSource], texts: Mapping[str, TextEmbedding] | None = None
) -> list[RowResult]:
    """Run all rows of a case in one batch. `noise` has one source per row; `texts` replace the text encoder."""
    plans, observed = plan_case(model, case), ObservedModel(model, texts or {})

    async def generate() -> list[GenerationResult]:
        options = EngineOptions(warmup_budget_s=0.0, max_queue_s=1e9)
        async with Engine(observed, options, noise_factory=lambda seed: noise[seed]) as engine:
            return await asyncio.gather(*(engine.generate(row, frames=plans[0].frames) for row in case.requests))

    results = []
    for plan, result, own in zip(plans, asyncio.run(generate()), noise, strict=True):
        made = torch.stack([observed.latents[own][frame] for frame in range(plan.frames)], dim=1)
        audio = torch.from_numpy(result.audio[0])[:, : plan.output_samples]
        results.append(RowResult(plan, made, audio, observed.calls))
    return results


def plan_case(model: DiffusionModel, case: Case) -> list[RowPlan]:
    """Returns one plan per row, all with the same latent length.

    For Stable Audio 3, this is the length of the longest row, headroom included. For the Stable Audio Open family, it
    depends only on the sample size.
    """
    frames = case.sample_size // model.spec.hop
    if isinstance(model, Sa3Model):
        rule = replace(model.config.lengths, max_samples=case.sample_size)
        longest_s = max(request.duration_s for request in case.requests)
        frames = plan_length(longest_s, rule, padding_s=case.requests[0].duration_padding_s or 0.0).frames
    return [model.plan(request, frames=frames)[0] for request in case.requests]


def draw_script(model: DiffusionModel, case: Case) -> samplers.Script:
    """Returns the reference's draws in order: start noise, source windows, sampler steps, decode windows.

    Runs encoder and decoder on silence to record which draws each window requests. The reference encodes a source once
    for all rows.
    """
    plan, hop, num_rows = plan_case(model, case)[0], model.spec.hop, len(case.requests)
    latent = (num_rows, model.spec.card.latent_channels, plan.frames)
    encoding, decoding = RowNoise(SeededNoise(0)), RowNoise(SeededNoise(0), num_rows=num_rows)
    for stage, source in (("init", plan.init_source), ("inpaint", plan.inpaint_source)):
        if source is not None:
            for span in _reference_windows(model, plan.frames):
                silence = torch.zeros(model.spec.card.channels, (span.stop - span.start) * hop)
                model.encode_audio([EncodeWindow(silence, span.start, stage, encoding)])
    for span in plan.decode_windows:
        zeros = torch.zeros(latent[1], span.stop - span.start, device=model.device)
        model.decode([DecodeWindow(zeros, span.start, decoding)])
    steps = samplers.sampler_script(case.requests[0].sampler or "", plan.sampler, shape=latent)
    return [ReplayDraw("initial", 0, latent), *encoding.requested, *steps, *decoding.requested]


def _reference_windows(model: DiffusionModel, frames: int) -> tuple[WindowSpan, ...]:
    """Returns the windows in which the reference encodes a source, including windows that the denoiser does not use."""
    is_chunked = isinstance(model, Sa3Model) and model.config.chunked
    return chunked_windows(frames) if is_chunked else whole_window(frames)


def replay_rows(case: Case, script: samplers.Script) -> list[NoiseSource]:
    """Returns one noise source per row that replays the draws of `script`."""
    replay = ReplayNoise(case.seed, script, num_rows=len(case.requests))
    rows = [replay.row(row) for row in range(len(case.requests))]
    if not any(isinstance(draw, ReplayDraw) and draw.stage == SOURCE_DRAW for draw in script):
        return rows
    return [RowNoise(row, replay.draw(SOURCE_DRAW, 0)[0]) for row in rows]


def _run(it: Subject, match: re.Match[str]) -> Iterator[Finding | str]:
    """Repeat a case with all its rows. If a run without noise in the autoencoder is stored, repeat it too."""
    goldens, name, facts = it.goldens, match[0], it.goldens.section("cases", match[0])
    goldens.matching(re.escape(name) + "/.*")
    model, texts, is_open = it.model, {}, isinstance(it.model, SaoModel)
    if is_open:
        if name.startswith("gen/rf_") and "rectified_flow_cases" in goldens.facts:
            model = _with_objective(model, "rectified_flow")
        case = parse_open_case(facts, goldens=goldens, card=model.spec.card)
    else:
        case = parse_case(facts, goldens=goldens, chunked=model.config.chunked)
    if reason := skip_reason(facts["args"]):
        yield f"{name}: {reason}"
        return
    plans, script, sampler = plan_case(model, case), draw_script(model, case), case.requests[0].sampler or ""
    if is_open:
        texts = _stored_texts(goldens, name, case=case, model=model)
        yield from _compare_inputs(goldens, f"{name}/", plans=plans, model=model)
    yield from samplers.compare_script(name, script, facts=facts, sampler=sampler)
    yield from _compare_plans(goldens, name, plans=plans)
    results = run_case(model, case, noise=replay_rows(case, script), texts=texts)
    if sigmas := facts.get("trace_sigma"):
        trace = {"calls": _guided_calls(results[0]), "result": results[0].latents[None], "sigmas": sigmas}
        for step in samplers.compare_steps(f"{name}/trace_", plans[0].sampler, sampler=sampler, it=it, **trace):
            yield step._replace(component="end-to-end steps")
    yield from _compare_rows(goldens, name, results=results, clips=not is_open)
    if goldens.matching(re.escape(name) + "/.*" + _SILENT):
        silent = [draw for draw in script if not (isinstance(draw, ReplayDraw) and "/" in draw.stage)]
        with calls_of(model.denoiser.get_submodule("transformer.layers.0.to_local_embed")) as embedded:
            results = run_case(model, case, noise=[RowNoise(row) for row in replay_rows(case, silent)])
        yield from _compare_rows(goldens, name, suffix=_SILENT, results=results, clips=not is_open)
        if (local := goldens.find(key := f"{name}/local_add_cond{_SILENT}")) is not None:
            yield Finding(key, embedded[0][0].mT.cpu(), local, component="autoencoder")


def _guided_calls(row: RowResult) -> samplers.Calls:
    """Returns the network's inputs and guided outputs of a row that ran alone."""
    calls, rows = [], GuidanceBatch.of([row.plan.guidance])
    for evaluation, (x, output) in zip(row.plan.sampler.evaluations, row.calls, strict=True):
        x, plain, t = x[:1], output[:1], torch.tensor([evaluation.t])
        if evaluation.guided:
            plain = guide(x, t, conditional=plain, unconditional=output[1:], valid=None, rows=rows)
        calls.append((x, plain))
    return calls


def _compare_inputs(goldens: Goldens, prefix: str, *, plans: Sequence[RowPlan], model: SaoModel) -> Iterator[Finding]:
    """Compare each row's network inputs that are stored: context, negative context and global vector."""
    for row, plan in enumerate(plans):
        prompt, negative = model.encode_text([plan.prompt, plan.negative_prompt or ""])
        away = None if plan.negative_prompt is None else negative
        with calls_of(model.denoiser.to_cond_embed) as contexts, calls_of(model.denoiser.to_global_embed) as vectors:
            model.condition(plan, prompt=prompt, negative=away, inpaint_latents=None)
        found = zip(("cross_attn_cond", "negative_cross_attn_cond"), contexts, strict=False)
        for name, (value, _) in (*found, ("global_cond", vectors[0])):
            if (stored := goldens.find(prefix + name)) is not None:
                component = "number" if name == "global_cond" else "text in float16"
                yield Finding(f"{prefix}{name}[{row}]", value, stored[row : row + 1], component=component)


def _inputs(it: Subject, _: object) -> Iterator[Finding]:
    """Compare the network inputs for the conditions in the facts, and the tokens of the negative prompt."""
    model, goldens, key = it.model, it.goldens, "dit/negative_cross_attn_cond"
    args = {"conditioning": goldens.facts["cond_inputs_batch"], "sample_size": model.spec.hop, "steps": 2, "seed": 0}
    case = parse_open_case({"args": args}, goldens=goldens, card=model.spec.card)
    yield from _compare_inputs(goldens, "cond/inputs_", plans=plan_case(model, case), model=model)
    tokens = model.encode_text([goldens.facts["dit"]["negative_prompt"]])[0].tokens
    stored = _prompt_part(goldens[key], model)
    yield Finding(key, tokens.expand_as(stored), stored)


def _prompt_part(contexts: Tensor, model: SaoModel) -> Tensor:
    """Returns the prompt's tokens in contexts (B, T, width)."""
    return contexts[:, model.config.context_ids.index(model.config.prompt.id) :][:, : model.config.prompt.max_length]


def _compare_plans(goldens: Goldens, name: str, *, plans: Sequence[RowPlan]) -> Iterator[Finding]:
    """Compare the latent lengths and noise levels of a case."""
    facts = goldens.section("cases", name)
    for plan, valid in zip(plans, facts.get("valid_latents", ()), strict=False):
        yield same(f"{name}/valid_latents", int(valid), found=plan.valid_frames, component="lengths")
    if (latents := goldens.find(f"{name}/latents")) is not None:
        yield same(f"{name}/latents", latents.shape[-1], found=plans[0].frames, component="lengths")
    levels = torch.stack([samplers.step_levels(plan.sampler) for plan in plans])
    for key in facts.keys() & {"sigmas", "trace_sigma"}:
        expected = torch.tensor(facts[key], dtype=torch.float32)
        size = expected.clamp(min=1.0)  # levels over sigma reach 500
        found = torch.nn.functional.pad(levels, (0, int(key == "sigmas")))  # `sigmas` ends with the final 0
        yield Finding(f"{name}/{key}", found / size, (expected / size).expand_as(found), component="schedules")


def _compare_rows(
    goldens: Goldens, name: str, *, suffix: str = "", results: Sequence[RowResult], clips: bool
) -> Iterator[Finding | str]:
    """Compare the latents in each row's valid frames, and the audio up to the row's length.

    Outputs that were computed without key-masked padding are comparable only for rows without padding.
    """
    one_length = len({result.plan.output_samples for result in results}) == 1
    for output in ("latents", "audio"):
        keys = [f"{name}/{output}{kind}{suffix}" for kind in ("_keymask", "")]
        key, *twins = [key for key in keys if goldens.find(key) is not None] or [""]
        if twins:
            yield "value-zeroed numbers: their key-masked twins are compared"
        rows = zip(goldens[key], results, strict=True) if key else ()
        for row, (expected, (plan, latents, audio, _)) in enumerate(rows):
            if "_keymask" not in key and plan.valid_frames < plan.frames:
                yield "padded rows of value-zeroed numbers: no key-masked twin"
            elif output == "latents":
                valid = torch.arange(plan.frames) < plan.valid_frames
                yield Finding(f"{key}[{row}]", latents, expected, valid, "end-to-end latents")
            else:
                clipped = audio.clip(-1.0, 1.0) if clips else audio
                trimmed = expected if one_length else expected[:, : plan.output_samples]  # stored: the longest row's
                yield Finding(f"{key}[{row}]", clipped, trimmed, component="end-to-end audio")


def _with_objective(model: SaoModel, objective: str) -> SaoModel:
    """Returns a model with the same networks, sampled as if trained for `objective`."""
    config = replace(model.config, objective=objective)
    spec = build_spec(replace(model.spec.card, objective=objective), config)
    parts = SaoComponents(model.text, model.prompt, model.numbers, model.denoiser, model.autoencoder)
    return SaoModel(parts, config=config, spec=spec, device=model.device)


def _stored_texts(goldens: Goldens, name: str, *, case: Case, model: SaoModel) -> dict[str, TextEmbedding]:
    """Returns the prompts' embeddings from the stored contexts. Tokens with only zeros are padding."""
    prompts, contexts = [request.prompt for request in case.requests], goldens[f"{name}/cross_attn_cond"]
    if (away := goldens.find(f"{name}/negative_cross_attn_cond")) is not None:
        prompts += [request.negative_prompt or "" for request in case.requests]
        contexts = torch.cat([contexts, away])
    tokens = dict(zip(prompts, _prompt_part(contexts, model), strict=True))
    return {prompt: TextEmbedding(prompt, stored, (stored != 0).any(dim=-1)) for prompt, stored in tokens.items()}


def _edit(it: Subject, match: re.Match[str]) -> Iterator[Finding]:
    """Edit the middle fifth of sources with stored encodings, as an inpainting and as a variation.

    Frames outside the edited region must equal the stored encodings. There are no stored edits, because the reference
    cannot edit regions with these models.
    """
    waves, stored, spec = it.goldens["ae/wave"], it.goldens[match[0]], it.model.spec
    draws = torch.randn(stored.shape, generator=torch.Generator().manual_seed(int(match[1])))
    fifth_s = waves.shape[-1] // spec.hop // 5 * spec.hop / spec.card.sample_rate_hz
    level, regions_s = spec.card.noise_level(0.5, sampler=None), ((2 * fifth_s, 3 * fifth_s),)
    requests = [replace(it.request(wave), seed=row, steps=3, init_noise_level=level) for row, wave in enumerate(waves)]
    variations = [replace(one, inpaint_audio=one.init_audio, inpaint_regions_s=regions_s) for one in requests]
    edits = [replace(one, init_audio=None) for one in variations]
    for name, rows in (("an edit", edits), ("a variation", variations)):
        noise = [RowNoise(SeededNoise(row), draw) for row, draw in enumerate(draws)]
        for row, result in enumerate(run_case(it.model, Case(tuple(rows), 0, waves.shape[-1]), noise=noise)):
            kept = result.plan.keep_mask  # without a mask, all frames are compared, and the comparison fails
            only = None if kept is None else kept.bool()
            yield Finding(f"{match[0]} kept by {name}[{row}]", result.latents, stored[row], only)


RUNS = (
    Check("end-to-end", "gen/.*", _run, over="cases"),
    Check("text in float16", "inputs", _inputs, over="once", family=SaoModel),
    Check("end-to-end latents", r"ae/encode_seed(\d+)", _edit, family=SaoModel),
)
