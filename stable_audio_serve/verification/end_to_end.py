"""Checks of whole runs through the engine: lengths, schedules, draws, network inputs, steps, latents and audio.

Runs of the Stable Audio Open family use the stored text embeddings. The reference's text encoder computes in float16,
whose last bits differ between machines. The encoder has separate checks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from stable_audio_serve.core.generation import GenerationRequest, SourceAudio
from stable_audio_serve.models.protocol import RowPlan, TextEmbedding
from stable_audio_serve.models.sao.build import build_spec
from stable_audio_serve.models.sao.model import SaoComponents, SaoModel
from stable_audio_serve.sampling import GuidanceBatch, ReplayPath, SeededNoise, guide
from stable_audio_serve.verification import runs, samplers
from stable_audio_serve.verification.checks import Check, Finding, Subject, same
from stable_audio_serve.verification.goldens import Goldens
from stable_audio_serve.verification.networks import calls_of
from stable_audio_serve.verification.runs import Case, RowNoise, RowResult

_SILENT = "_ae_noise_off"


def _run(it: Subject, match: re.Match[str]) -> Iterator[Finding | str]:
    """Repeat a case with all its rows. A second run has no noise in the autoencoder, if its outputs are stored."""
    goldens, name, facts = it.goldens, match[0], it.goldens.section("cases", match[0])
    goldens.matching(re.escape(name) + "/.*")
    model, texts, is_open = it.model, {}, isinstance(it.model, SaoModel)
    if is_open:
        if name.startswith("gen/rf_") and "rectified_flow_cases" in goldens.facts:
            model = _with_objective(model, "rectified_flow")
        case = runs.parse_open_case(facts, goldens=goldens, card=model.spec.card)
    else:
        case = runs.parse_case(facts, goldens=goldens, chunked=model.config.chunked)
    if reason := runs.skip_reason(facts["args"]):
        yield f"{name}: {reason}"
        return
    plans, script, sampler = runs.plan_case(model, case), runs.draw_script(model, case), case.requests[0].sampler or ""
    if is_open:
        texts = _stored_texts(goldens, name, case=case, model=model)
        yield from _compare_inputs(model, plans, goldens=goldens, prefix=f"{name}/")
    yield from samplers.compare_script(name, script, facts=facts, sampler=sampler)
    yield from _compare_plans(goldens, name, plans=plans)
    results = runs.run_case(model, case, noise=runs.replay_rows(case, script), texts=texts)
    if sigmas := facts.get("trace_sigma"):
        plan, calls, latents = plans[0].sampler, _guided_calls(results[0]), results[0].latents[None]
        steps = samplers.compare_steps(
            f"{name}/trace_", plan, calls=calls, result=latents, sampler=sampler, sigmas=sigmas, it=it
        )
        yield from (step._replace(component="end-to-end steps") for step in steps)
    yield from _compare_rows(goldens, name, results=results, clips=not is_open)
    if goldens.matching(re.escape(name) + "/.*" + _SILENT):
        silent = [draw for draw in script if isinstance(draw, ReplayPath) or "/" not in draw.stage]
        noise = [RowNoise(row) for row in runs.replay_rows(case, silent)]
        with calls_of(model.denoiser.get_submodule("transformer.layers.0.to_local_embed")) as embedded:
            results = runs.run_case(model, case, noise=noise)
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


def _compare_inputs(model: SaoModel, plans: Sequence[RowPlan], *, goldens: Goldens, prefix: str) -> Iterator[Finding]:
    """Compare each row's network inputs that are stored: context, negative context and global vector."""
    for row, plan in enumerate(plans):
        prompt, negative = model.encode_text([plan.prompt, plan.negative_prompt or ""])
        away = None if plan.negative_prompt is None else negative
        entries = calls_of(model.denoiser.to_cond_embed), calls_of(model.denoiser.to_global_embed)
        with entries[0] as contexts, entries[1] as vectors:
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
    case = runs.parse_open_case({"args": args}, goldens=goldens, card=model.spec.card)
    yield from _compare_inputs(model, runs.plan_case(model, case), goldens=goldens, prefix="cond/inputs_")
    tokens = model.encode_text([goldens.facts["dit"]["negative_prompt"]])[0].tokens
    stored = goldens[key][:, _prompt_part(model)]
    yield Finding(key, tokens.expand_as(stored), stored)


def _prompt_part(model: SaoModel) -> slice:
    """Returns the prompt's tokens in a context."""
    before = model.config.context_ids.index(model.config.prompt.id)
    return slice(before, before + model.config.prompt.max_length)


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

    Prefers outputs computed with key-masked padding. Other outputs are comparable only for rows without padding. Stored
    audio is as long as the longest row of the batch.
    """
    one_length = len({result.plan.output_samples for result in results}) == 1
    for output in ("latents", "audio"):
        key = f"{name}/{output}_keymask{suffix}"
        stored, zeroed = goldens.find(key), goldens.find(f"{name}/{output}{suffix}")
        is_masked = stored is not None
        if is_masked and zeroed is not None:
            yield "value-zeroed numbers: their key-masked twins are compared"
        elif zeroed is not None:
            stored, key = zeroed, f"{name}/{output}{suffix}"
        rows = [] if stored is None else list(zip(stored, results, strict=True))
        for row, (expected, (plan, latents, audio, _)) in enumerate(rows):
            if not is_masked and plan.valid_frames < plan.frames:
                yield "padded rows of value-zeroed numbers: no key-masked twin"
            elif output == "latents":
                valid = torch.arange(plan.frames) < plan.valid_frames
                yield Finding(f"{key}[{row}]", latents, expected, valid, "end-to-end latents")
            else:
                clipped = audio.clip(-1.0, 1.0) if clips else audio
                trimmed = expected if one_length else expected[:, : plan.output_samples]
                yield Finding(f"{key}[{row}]", clipped, trimmed, component="end-to-end audio")


def _with_objective(model: SaoModel, objective: str) -> SaoModel:
    """Returns a model with the same networks, sampled as if trained for `objective`."""
    config = replace(model.config, objective=objective)
    spec = build_spec(replace(model.spec.card, objective=objective), config)
    parts = SaoComponents(model.text, model.prompt, model.numbers, model.denoiser, model.autoencoder)
    return SaoModel(parts, config=config, spec=spec, device=model.device)


def _stored_texts(goldens: Goldens, name: str, *, case: Case, model: SaoModel) -> dict[str, TextEmbedding]:
    """Returns the prompts' embeddings from the stored contexts. Tokens with only zeros are padding."""
    contexts, part = goldens[f"{name}/cross_attn_cond"], _prompt_part(model)
    tokens = {request.prompt: contexts[row, part] for row, request in enumerate(case.requests)}
    if (away := goldens.find(f"{name}/negative_cross_attn_cond")) is not None:
        tokens |= {request.negative_prompt or "": away[row, part] for row, request in enumerate(case.requests)}
    return {prompt: TextEmbedding(prompt, stored, (stored != 0).any(dim=-1)) for prompt, stored in tokens.items()}


def _edit(it: Subject, match: re.Match[str]) -> Iterator[Finding]:
    """Edit the middle fifth of sources with stored encodings, as an inpainting and as a variation.

    The reference cannot edit regions with these models. The check needs no reference run: after an edit, frames outside
    the regions equal the source's latents.
    """
    waves, stored, spec = it.goldens["ae/wave"], it.goldens[match[0]], it.model.spec
    rate_hz, num_samples = spec.card.sample_rate_hz, waves.shape[-1]
    fifth_s = num_samples // spec.hop // 5 * spec.hop / rate_hz
    draws = torch.randn(stored.shape, generator=torch.Generator().manual_seed(int(match[1])))
    edit = GenerationRequest(
        prompt="",
        duration_s=num_samples / rate_hz,
        seed=0,
        steps=3,
        init_noise_level=spec.card.noise_level(0.5, sampler=None),
        inpaint_regions_s=((2 * fifth_s, 3 * fifth_s),),
    )
    sources = [SourceAudio(wave.numpy(), rate_hz) for wave in waves]
    edits = [replace(edit, seed=row, inpaint_audio=source) for row, source in enumerate(sources)]
    variations = [replace(edit, init_audio=edit.inpaint_audio) for edit in edits]
    for name, rows in (("an edit", edits), ("a variation", variations)):
        noise = [RowNoise(SeededNoise(row), draw) for row, draw in enumerate(draws)]
        for row, result in enumerate(runs.run_case(it.model, Case(tuple(rows), 0, num_samples), noise=noise)):
            if (kept := result.plan.keep_mask) is None:
                raise ValueError("no mask was planned")
            yield Finding(f"{match[0]} kept by {name}[{row}]", result.latents, stored[row], kept.bool())


RUNS = (
    Check("end-to-end", "gen/.*", _run, over="cases"),
    Check("text in float16", "inputs", _inputs, over="once", family=SaoModel),
    Check("end-to-end latents", r"ae/encode_seed(\d+)", _edit, family=SaoModel),
)
