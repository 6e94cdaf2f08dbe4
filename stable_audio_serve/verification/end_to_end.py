"""Checks of whole runs through the engine: lengths, schedules, draws, conditioning, steps, latents and audio. A further
check compares the frames that a masked edit keeps.

Runs of the Stable Audio Open family use the stored text embeddings. The reference's text encoder computes in float16,
whose last bits differ between machines. The encoder has separate checks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from stable_audio_serve.core.generation import GenerationRequest, SourceAudio
from stable_audio_serve.models.protocol import (
    EncodeWindow,
    RowConditioning,
    RowPlan,
    StepBatch,
    TextEmbedding,
    WindowSpan,
)
from stable_audio_serve.models.sao.build import build_spec
from stable_audio_serve.models.sao.model import SaoComponents, SaoModel
from stable_audio_serve.sampling import GuidanceBatch, ReplayDraw, ReplayNoise, SeededNoise, guide
from stable_audio_serve.verification.autoencoder import join_windows
from stable_audio_serve.verification.checks import Check, Finding, Subject, same
from stable_audio_serve.verification.denoiser import watch
from stable_audio_serve.verification.goldens import Goldens
from stable_audio_serve.verification.runs import (
    SOURCE_DRAW,
    Case,
    RowNoise,
    RowResult,
    draw_script,
    parse_case,
    parse_open_case,
    plan_case,
    replay_rows,
    run_case,
    skip_reason,
)
from stable_audio_serve.verification.samplers import (
    Script,
    StepPoint,
    compare_script,
    compare_steps,
    step_levels,
    walk_plan,
)

_SILENT = "_ae_noise_off"


def _run(it: Subject, match: re.Match[str]) -> Iterator[Finding | str]:
    """Compare a run of all rows. A second run has no noise in the autoencoder, if its outputs are stored."""
    goldens, name, facts = it.goldens, match[0], it.goldens.section("cases", match[0])
    goldens.matching(re.escape(name) + "/.*")
    model, texts, is_open = it.model, {}, isinstance(it.model, SaoModel)
    if is_open:
        model = _with_objective(model, objective_of(name, goldens, trained=model.config.objective))
        case = parse_open_case(name, facts, goldens=goldens, card=model.spec.card)
    else:
        case = parse_case(name, facts, goldens=goldens, chunked=model.config.chunked)
    if reason := skip_reason(facts["args"]):
        yield f"{name}: {reason}"
        return
    plans, script, sampler = plan_case(model, case), draw_script(model, case), case.requests[0].sampler or ""
    if is_open:
        texts = _stored_texts(goldens, case, model=model)
        yield from _compare_length(model, case, goldens=goldens)
        yield from _compare_conditions(model, plans, goldens=goldens, prefix=f"{name}/")
    yield from compare_script(name, script, facts=facts, sampler=sampler)
    yield from _compare_plans(name, plans, facts=facts)
    if (sigmas := facts.get("trace_sigma")) is not None:
        points = _walk(model, case, script=script, texts=texts)
        steps = compare_steps(points, f"{name}/trace_", sampler=sampler, sigmas=sigmas, goldens=goldens)
        yield from (step._replace(component="end-to-end steps") for step in steps)
    windows = [draw for draw in script if isinstance(draw, ReplayDraw) and "/" in draw.stage]
    silent = replay_rows(case, [draw for draw in script if draw not in windows])
    for suffix, noise in (("", replay_rows(case, script)), (_SILENT, [RowNoise(row) for row in silent])):
        run = cache(partial(run_case, model, case, noise=noise, texts=texts))
        yield from _compare_rows(goldens, name, suffix=suffix, plans=plans, run=run, clips=not is_open)
    if (local := goldens.find(key := f"{name}/local_add_cond{_SILENT}")) is not None:
        yield Finding(key, _silent_conditioning(model, plans[0]), local, component="autoencoder")


def _compare_plans(name: str, plans: Sequence[RowPlan], *, facts: Mapping[str, Any]) -> Iterator[Finding]:
    """Compare the lengths and noise levels that the case states."""
    for plan, valid in zip(plans, facts.get("valid_latents", ()), strict=False):
        yield same(f"{name}/valid_latents", int(valid), found=plan.valid_frames, component="lengths")
    if shape := facts.get("latent_shape"):
        yield same(f"{name}/latent_shape", int(shape[-1]), found=plans[0].frames, component="lengths")
    levels = torch.stack([step_levels(plan.sampler) for plan in plans])
    if stated := facts.get("sigmas"):
        found, expected = torch.nn.functional.pad(levels, (0, 1)), torch.tensor(stated, dtype=torch.float32)
        yield Finding(f"{name}/sigmas", found, expected.expand_as(found), component="schedules")
    if stated := facts.get("trace_sigma"):
        expected = torch.tensor(stated)
        size = expected.clamp(min=1.0)  # levels reach 500
        yield Finding(f"{name}/trace_sigma", levels[0] / size, expected / size, component="schedules")


def _compare_rows(
    goldens: Goldens,
    name: str,
    *,
    suffix: str,
    plans: Sequence[RowPlan],
    run: Callable[[], Sequence[RowResult]],
    clips: bool,
) -> Iterator[Finding | str]:
    """Compare the latents in each row's valid frames, and the audio up to the row's length.

    Prefers outputs computed with key-masked padding. Other outputs are comparable only for rows without padding. Calls
    `run` only if there is an output to compare. Stored audio is as long as the longest row of the batch.
    """
    one_length = len({plan.output_samples for plan in plans}) == 1
    for output in ("latents", "audio"):
        key = f"{name}/{output}_keymask{suffix}"
        stored, zeroed = goldens.find(key), goldens.find(f"{name}/{output}{suffix}")
        is_masked = stored is not None
        if is_masked and zeroed is not None:
            yield "value-zeroed numbers: their key-masked twins are compared"
        elif zeroed is not None:
            stored, key = zeroed, f"{name}/{output}{suffix}"
        for row, expected in enumerate([] if stored is None else stored):
            plan = plans[row]
            if not is_masked and plan.valid_frames < plan.frames:
                yield "padded rows of value-zeroed numbers: no key-masked twin"
            elif output == "latents":
                valid = torch.arange(plan.frames) < plan.valid_frames
                yield Finding(f"{key}[{row}]", run()[row].latents, expected, valid, "end-to-end latents")
            else:
                audio = run()[row].audio.clip(-1.0, 1.0) if clips else run()[row].audio
                trimmed = expected if one_length else expected[:, : plan.output_samples]
                yield Finding(f"{key}[{row}]", audio, trimmed, component="end-to-end audio")


def _silent_conditioning(model: Any, plan: RowPlan) -> Tensor:
    """Returns a row's local conditioning (1, 1 + D, F): mask, then kept latents, encoded without noise."""
    source, mask = plan.inpaint_source, plan.keep_mask
    if source is None or mask is None:
        return torch.zeros(1, 1 + model.spec.card.latent_channels, plan.frames)

    def encode(span: WindowSpan) -> Tensor:
        samples, noise = source.cut(span, hop=model.spec.hop), RowNoise(SeededNoise(0))
        return model.encode_audio([EncodeWindow(samples, span.start, "inpaint", noise)])[0].cpu()

    return torch.cat([mask[None], join_windows(source.windows, encode, unit=1) * mask])[None]


def objective_of(name: str, goldens: Goldens, *, trained: str) -> str:
    """Returns rectified_flow if the facts list the run's name or a pattern that matches it, otherwise `trained`."""
    stated = goldens.facts.get("rectified_flow_cases", ())
    patterns = [word for word in stated.split() if "/" in word] if isinstance(stated, str) else stated
    return "rectified_flow" if any(fnmatchcase(name, pattern) for pattern in patterns) else trained


def _with_objective(model: SaoModel, objective: str) -> SaoModel:
    """Returns a model with the same networks, sampled as if trained for `objective`."""
    if objective == model.config.objective:
        return model
    config = replace(model.config, objective=objective)
    spec = build_spec(replace(model.spec.card, objective=objective), config)
    parts = SaoComponents(model.text, model.prompt, model.numbers, model.denoiser, model.autoencoder)
    return SaoModel(parts, config=config, spec=spec, device=model.device)


def _compare_length(model: SaoModel, case: Case, *, goldens: Goldens) -> Iterator[Finding]:
    """Plan a run as long as the model's window without an explicit number of frames, and compare the frames."""
    if case.sample_size == model.config.sample_size:
        # The longest duration is shorter than the window if the window is no whole number of frames.
        request, cap_s = case.requests[0], model.spec.card.max_duration_s
        planned = model.plan(replace(request, duration_s=min(request.duration_s, cap_s)))[0].frames
        key = f"{case.name}/latents"
        yield same(key, goldens[key].shape[-1], found=planned, component="lengths")


def _assembly(it: Subject, _: object) -> Iterator[Finding]:
    """Compare the conditioning of the inputs listed in the facts."""
    rows = it.goldens.facts["cond_inputs_batch"]
    args = {"conditioning": rows, "batch_size": len(rows), "sample_size": it.model.spec.hop, "steps": 2, "seed": 0}
    case = parse_open_case("cond/inputs", {"args": args}, goldens=it.goldens, card=it.model.spec.card)
    return _compare_conditions(it.model, plan_case(it.model, case), goldens=it.goldens, prefix="cond/inputs_")


def _compare_conditions(
    model: SaoModel, plans: Sequence[RowPlan], *, goldens: Goldens, prefix: str
) -> Iterator[Finding]:
    """Compare each row's network inputs: context, negative context if any, and global vector."""
    for row, plan in enumerate(plans):
        prompts = {plan.prompt, plan.negative_prompt or plan.prompt}
        texts = {prompt: model.encode_text([prompt])[0] for prompt in prompts}
        entries = [model.denoiser.to_cond_embed, model.denoiser.to_global_embed]
        contexts, vectors = watch(entries, partial(_condition, model, plan, texts=texts))
        for index, (context, _) in enumerate(contexts):
            key = f"{prefix}{'negative_' * index}cross_attn_cond"
            yield Finding(f"{key}[{row}]", context, goldens[key][row : row + 1], component="text in float16")
        key = f"{prefix}global_cond"
        yield Finding(f"{key}[{row}]", vectors[0][0], goldens[key][row : row + 1], component="number")


def _condition(model: SaoModel, plan: RowPlan, *, texts: Mapping[str, TextEmbedding]) -> RowConditioning:
    negative = None if plan.negative_prompt is None else texts[plan.negative_prompt]
    return model.condition(plan, prompt=texts[plan.prompt], negative=negative, inpaint_latents=None)


def _stored_texts(goldens: Goldens, case: Case, *, model: SaoModel) -> dict[str, TextEmbedding]:
    """Returns the prompts' embeddings from the stored contexts. Tokens with only zeros are padding."""
    before = model.config.context_ids.index(model.config.prompt.id)
    part = slice(before, before + model.config.prompt.max_length)
    contexts = goldens[f"{case.name}/cross_attn_cond"]
    tokens = {request.prompt: contexts[row, part] for row, request in enumerate(case.requests)}
    if (away := goldens.find(f"{case.name}/negative_cross_attn_cond")) is not None:
        tokens |= {request.negative_prompt or "": away[row, part] for row, request in enumerate(case.requests)}
    return {prompt: TextEmbedding(prompt, stored, (stored != 0).any(dim=-1)) for prompt, stored in tokens.items()}


def _walk(model: SaoModel, case: Case, *, script: Script, texts: Mapping[str, TextEmbedding]) -> list[StepPoint]:
    """Returns the steps of a run outside the engine."""
    plans = plan_case(model, case)
    rows = [_condition(model, plan, texts=texts) for plan in plans]
    terms = GuidanceBatch.of([plan.guidance for plan in plans])
    guided_times = {call.t for call in plans[0].sampler.evaluations if call.guided}
    replay = ReplayNoise(case.seed, script, num_rows=len(plans))
    noise, source = replay.draw("initial", 0), None
    if plans[0].init_source is not None:
        samples = plans[0].init_source.samples[None].float()
        source = model.autoencoder.encode(samples, replay.draw(SOURCE_DRAW, 0)).expand(len(plans), -1, -1)

    def run(x: Tensor, t: float, *, branch: str) -> Tensor:
        times, valid = torch.full((len(x),), t), torch.ones(len(x), x.shape[-1], dtype=torch.bool)
        return model.denoise(StepBatch.of(x, t=times, valid=valid, branches=[getattr(row, branch) for row in rows]))

    def unguided(x: Tensor, t: float) -> Tensor:
        return run(x, t, branch="unconditional")

    def guided(x: Tensor, t: float) -> Tensor:
        plain, times = run(x, t, branch="conditional"), torch.full((len(x),), t)
        if t not in guided_times:
            return plain
        return guide(x, times, conditional=plain, unconditional=unguided(x, t), valid=None, rows=terms)

    return walk_plan(plans[0].sampler, replay, noise=noise, source=source, network=guided, unguided=unguided)


def _edit(it: Subject, match: re.Match[str]) -> Iterator[Finding]:
    """Edit the middle fifth of sources with stored encodings, as an inpainting and as a variation.

    The reference cannot edit regions with these models. The check needs no reference run: after an edit, frames outside
    the regions equal the source's latents.
    """
    waves, stored, spec = it.goldens["ae/wave"], it.goldens[match[0]], it.model.spec
    rate_hz, num_samples = spec.card.sample_rate_hz, waves.shape[-1]
    fifth_s = num_samples // spec.hop // 5 * spec.hop / rate_hz
    draws = torch.randn(stored.shape, generator=torch.Generator().manual_seed(int(match[1])))
    edits = [
        GenerationRequest(
            prompt="",
            duration_s=num_samples / rate_hz,
            seed=row,
            steps=3,
            init_noise_level=spec.card.noise_level(0.5, sampler=None),
            inpaint_audio=SourceAudio(wave.numpy(), rate_hz),
            inpaint_regions_s=((2 * fifth_s, 3 * fifth_s),),
        )
        for row, wave in enumerate(waves)
    ]
    variations = [replace(edit, init_audio=edit.inpaint_audio) for edit in edits]
    for name, requests in (("an edit", edits), ("a variation", variations)):
        noise = [RowNoise(SeededNoise(row), draw) for row, draw in enumerate(draws)]
        case = Case(match[0], tuple(requests), 0, num_samples)
        for row, result in enumerate(run_case(it.model, case, noise=noise)):
            if result.plan.keep_mask is None:
                raise ValueError("no mask was planned")
            yield Finding(
                f"{match[0]} kept by {name}[{row}]", result.latents, stored[row], result.plan.keep_mask.bool()
            )


RUNS = Check("end-to-end", ".*", _run, over="cases")
OPEN_RUNS = (
    Check("number", "cond/inputs_cross_attn_cond", _assembly),
    RUNS,
    Check("end-to-end latents", r"ae/encode_seed(\d+)", _edit),
)
