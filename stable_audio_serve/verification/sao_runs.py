"""Compares whole runs of the Stable Audio Open family: conditions, draws, steps, latents and audio.

Runs take the stored prompt tokens, because the reference's text encoder computes in float16, whose last bits differ
from machine to machine; the encoder is compared by itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from stable_audio_serve.models.protocol import BranchConditioning, RowPlan, StepBatch, TextEmbedding
from stable_audio_serve.models.sao.model import SaoModel
from stable_audio_serve.sampling import GuidanceBatch, ReplayDraw, ReplayNoise, ReplayPath, guide
from stable_audio_serve.verification.bounds import Component
from stable_audio_serve.verification.cases import Case
from stable_audio_serve.verification.goldens import Goldens
from stable_audio_serve.verification.observed import ObservedModel, RowResult, Runner
from stable_audio_serve.verification.report import Report
from stable_audio_serve.verification.sao_common import compare_script
from stable_audio_serve.verification.sao_requests import (
    SOURCE_DRAW,
    draw_script,
    objective_of,
    parse_case,
    replay_rows,
    skip_reason,
    stored_tokens,
    with_objective,
)
from stable_audio_serve.verification.stepping import trace, walk_plan


def compare_runs(report: Report, goldens: Goldens, *, model: SaoModel) -> None:
    """Compare every case below gen/: through the engine, together with the other rows of its batch."""
    asyncio.run(_compare_cases(report, goldens, model=model))


class _StoredText(ObservedModel):
    """The model with the reference's own prompt tokens, by prompt."""

    def __init__(self, model: SaoModel) -> None:
        super().__init__(model)
        self.tokens: dict[str, Tensor] = {}

    def encode_text(self, prompts: Sequence[str]) -> list[TextEmbedding]:
        return [embed_stored(prompt, self.tokens) for prompt in prompts]


def embed_stored(prompt: str, tokens: Mapping[str, Tensor]) -> TextEmbedding:
    """Returns a prompt's stored tokens; those that are all zero are padding."""
    return TextEmbedding(prompt, tokens[prompt], (tokens[prompt] != 0).any(dim=-1))


async def _compare_cases(report: Report, goldens: Goldens, *, model: SaoModel) -> None:
    found: dict[str, list[str]] = {}
    for name in goldens.cases():
        found.setdefault(objective_of(name, goldens, trained=model.config.objective), []).append(name)
    for objective, names in found.items():
        adapted = with_objective(model, objective)
        observed = _StoredText(adapted)
        runner = Runner(adapted, num_frames=partial(window_frames, hop=adapted.spec.hop), observed=observed)
        try:
            for name in names:
                with report.guard("end-to-end", name):
                    await _compare_case(report, goldens, name=name, model=adapted, observed=observed, runner=runner)
        finally:
            await runner.close()


def window_frames(duration_s: float, *, padding_s: float, sample_size: int, hop: int) -> int:
    """Returns the latent frames of a run, which is as long as its window whatever the clip's duration."""
    return sample_size // hop


async def _compare_case(
    report: Report, goldens: Goldens, *, name: str, model: SaoModel, observed: _StoredText, runner: Runner
) -> None:
    facts = goldens.cases()[name]
    for key in goldens.names(f"{name}/"):
        goldens.mark(f"{name}/{key}")
    if reason := skip_reason(facts["args"]):
        report.skip("end-to-end", f"{name}: {reason}")
        return
    case = parse_case(name, facts, goldens=goldens, model=model)
    plans = runner.plan(case)
    script = draw_script(case, plans[0], model=model)
    sampler = case.requests[0].sampler or ""
    if (draws := facts.get("draws")) is not None:
        compare_script(report, name, script=script, draws=draws, sampler=sampler)
    _compare_length(report, goldens, case=case, model=model)
    _compare_conditions(report, goldens, case=case, plans=plans, model=model)
    observed.tokens = stored_tokens(goldens, case, model=model)
    if (stated := facts.get("trace_sigma")) is not None:
        with report.guard("end-to-end steps", name):
            _compare_steps(report, goldens, case=case, sigmas=stated, plans=plans, script=script, model=model)
    _compare_rows(report, goldens, name=name, results=await runner.run_with(case, replay_rows(case, script)))


def _compare_length(report: Report, goldens: Goldens, *, case: Case, model: SaoModel) -> None:
    """Compare the frames of a run as long as the model's window, planned without being told, with the stored ones."""
    if case.sample_size == model.config.sample_size:
        request, cap_s = case.requests[0], model.spec.card.max_duration_s  # less where a frame is left over
        planned = model.plan(replace(request, duration_s=min(request.duration_s, cap_s)))[0].frames
        stored = goldens[f"{case.name}/latents"].shape[-1]
        report.note("lengths", f"{case.name}/latents", difference=abs(planned - stored))


def _compare_conditions(
    report: Report, goldens: Goldens, *, case: Case, plans: Sequence[RowPlan], model: SaoModel
) -> None:
    """Compare the context and the global vector that each row's network is given, made from prompt and seconds."""
    for row, plan in enumerate(plans):
        contexts, global_cond = given_to_network(model, plan)
        stored = [goldens[f"{case.name}/cross_attn_cond"][row : row + 1]]
        if plan.negative_prompt is not None:
            stored.append(goldens[f"{case.name}/negative_cross_attn_cond"][row : row + 1])
        for index, (context, expected) in enumerate(zip(contexts, stored, strict=True)):
            key = f"{case.name}/{'negative_' * index}cross_attn_cond[{row}]"
            report.compare("text in float16", key, actual=context, expected=expected)
        expected = goldens[f"{case.name}/global_cond"][row : row + 1]
        report.compare("number", f"{case.name}/global_cond[{row}]", actual=global_cond, expected=expected)


def given_to_network(model: SaoModel, plan: RowPlan) -> tuple[list[Tensor], Tensor]:
    """Returns what enters the denoiser for a planned row: the context, the negative's if any, and the global vector."""
    contexts: list[Tensor] = []
    vectors: list[Tensor] = []
    handles = [
        module.register_forward_pre_hook(lambda _module, inputs, seen=seen: seen.append(inputs[0].clone()))
        for module, seen in ((model.denoiser.to_cond_embed, contexts), (model.denoiser.to_global_embed, vectors))
    ]
    try:
        prompt = model.encode_text([plan.prompt])[0]
        negative = None if plan.negative_prompt is None else model.encode_text([plan.negative_prompt])[0]
        model.condition(plan, prompt=prompt, negative=negative, inpaint_latents=None)
    finally:
        for handle in handles:
            handle.remove()
    return contexts, vectors[0]


def _compare_steps(
    report: Report,
    goldens: Goldens,
    *,
    case: Case,
    sigmas: Sequence[float],
    plans: Sequence[RowPlan],
    script: Sequence[ReplayDraw | ReplayPath],
    model: SaoModel,
) -> None:
    """Compare noise levels, x and the clean estimate at every step of a run outside the engine."""
    plan = plans[0]
    tokens = stored_tokens(goldens, case, model=model)
    levels = torch.tensor([plan.sampler.evaluations[start].sigma for start in (0, *plan.sampler.step_ends[:-1])])
    stated = torch.tensor(sigmas)
    sizes = stated.clamp(min=1.0)
    report.compare("schedules", f"{case.name}/trace_sigma", actual=levels / sizes, expected=stated / sizes)
    network = _GuidedNetwork(model, plans, tokens=tokens)
    replay = ReplayNoise(case.seed, script, num_rows=len(plans))
    noise = replay.draw("initial", 0)
    source = None
    if plan.init_source is not None:
        samples = plan.init_source.samples[None].float()
        source = model.autoencoder.encode(samples, replay.draw(SOURCE_DRAW, 0)).expand(len(plans), -1, -1)
    walk = walk_plan(
        plan.sampler,
        [replay.row(row) for row in range(len(plans))],
        noise=noise,
        source=source,
        network=network.guided,
        unguided=network.unguided,
    )
    stored = {part: goldens[f"{case.name}/trace_{part}"] for part in ("x", "denoised")}
    for step, traced in enumerate(trace(walk, case.requests[0].sampler or "", sigmas=sigmas)):
        size = max(1.0, float(stored["x"][step].abs().max()))
        for part, actual in (("x", traced.x), ("denoised", traced.denoised)):
            key = f"{case.name}/trace_{part}[{step}]"
            report.compare("end-to-end steps", key, actual=actual / size, expected=stored[part][step] / size)


class _GuidedNetwork:
    """The network of a batch of planned rows as functions of x (B, D, F) and a time of all rows."""

    def __init__(self, model: SaoModel, plans: Sequence[RowPlan], *, tokens: Mapping[str, Tensor]) -> None:
        self._model, self._plans = model, plans
        self._guided_times = {call.t for call in plans[0].sampler.evaluations if call.guided}
        self._rows = [
            model.condition(
                plan,
                prompt=embed_stored(plan.prompt, tokens),
                negative=None if plan.negative_prompt is None else embed_stored(plan.negative_prompt, tokens),
                inpaint_latents=None,
            )
            for plan in plans
        ]

    def guided(self, x: Tensor, t: float) -> Tensor:
        """Returns the guided output, or the plain one where the plan does not guide."""
        plain = self._run(x, t, branches=[row.conditional for row in self._rows])
        if t not in self._guided_times:
            return plain
        return guide(
            x,
            torch.full((len(x),), t),
            conditional=plain,
            unconditional=self.unguided(x, t),
            valid=None,
            rows=GuidanceBatch.of([plan.guidance for plan in self._plans]),
        )

    def unguided(self, x: Tensor, t: float) -> Tensor:
        """Returns the other branch's output."""
        branches = [row.unconditional for row in self._rows if row.unconditional is not None]
        return self._run(x, t, branches=branches)

    def _run(self, x: Tensor, t: float, *, branches: Sequence[BranchConditioning]) -> Tensor:
        valid = torch.ones(len(x), x.shape[-1], dtype=torch.bool)
        return self._model.denoise(StepBatch.of(x, t=torch.full((len(x),), t), valid=valid, branches=branches))


def _compare_rows(report: Report, goldens: Goldens, *, name: str, results: Sequence[RowResult]) -> None:
    for row, result in enumerate(results):
        pairs: tuple[tuple[Component, str, Tensor], ...] = (
            ("end-to-end latents", f"{name}/latents", result.latents),
            ("end-to-end audio", f"{name}/audio", result.audio),
        )
        for component, key, actual in pairs:
            if (stored := goldens.find(key)) is not None:
                report.compare(component, f"{key}[{row}]", actual=actual, expected=stored[row])
