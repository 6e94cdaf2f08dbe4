"""What is compared for a model of the Stable Audio Open family, part by part.

Runs take the stored prompt tokens, because the reference's text encoder computes in float16, whose last bits differ
from machine to machine; the encoder is compared by itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stable_audio_serve.core.errors import CheckpointError
from stable_audio_serve.core.generation import GenerationRequest, SourceAudio
from stable_audio_serve.models.protocol import RowPlan, TextEmbedding
from stable_audio_serve.models.sao.build import build_spec
from stable_audio_serve.models.sao.conditioners import load_text_encoder
from stable_audio_serve.models.sao.model import SaoComponents, SaoModel
from stable_audio_serve.sampling import NoiseSource, ReplayDraw, ReplayNoise, ReplayPath
from stable_audio_serve.verification.bounds import TIMES_ROUNDING, Component
from stable_audio_serve.verification.cases import Case
from stable_audio_serve.verification.goldens import Goldens, as_bool
from stable_audio_serve.verification.observed import ObservedModel, RowResult, Runner
from stable_audio_serve.verification.report import Report
from stable_audio_serve.verification.sao_networks import compare_autoencoder, compare_denoiser
from stable_audio_serve.verification.tables import compare_draws

# Groups of `rounding.largest_per_group`, and whose bound they give.
_ROUNDED: Mapping[str, Component] = {"latents": "end-to-end latents", "audio": "end-to-end audio"}
_SOURCE = "init/bottleneck"
_LIBRARY = {"v": ("dpmpp-2m-sde", 0.01, 100.0), "flow": ("euler", None, None)}  # where a case says nothing
_LIBRARY_CFG = 6.0
_REFUSED = ("k-dpm-adaptive",)


def compare_sao(report: Report, goldens: Goldens, *, model: SaoModel) -> None:
    """Compare everything the goldens hold about this model; an error in one part does not stop the others."""
    stated = goldens.facts.get("rounding", {}).get("largest_per_group", {})
    for group, component in _ROUNDED.items():
        if group in stated:
            report.bounds[component] = max(report.bounds[component], TIMES_ROUNDING * float(stated[group]))
    parts: dict[str, Callable[[], None]] = {  # by the name under which an error is reported
        "text": lambda: _compare_text(report, goldens, model=model),
        "number": lambda: _compare_numbers(report, goldens, model=model),
        "conditioning": lambda: _compare_assembly(report, goldens, model=model),
        "denoiser": lambda: compare_denoiser(report, goldens, model=model),
        "autoencoder": lambda: compare_autoencoder(report, goldens, net=model.autoencoder),
        "draws": lambda: compare_draws(report, goldens),
        "end-to-end": lambda: asyncio.run(_compare_cases(report, goldens, model=model)),
    }
    for part, compare in parts.items():
        with report.guard(part), torch.no_grad():
            compare()


def _compare_text(report: Report, goldens: Goldens, *, model: SaoModel) -> None:
    """Compare cond/*: the prompts of the facts through tokenizer, encoder in float16 and in float32, and masking."""
    prompts = goldens.facts.get("cond_t5", {}).get("prompts")
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise CheckpointError("golden.json: cond_t5.prompts must be a list of strings")
    ids, mask = model.text.tokenize(prompts)
    real = as_bool(mask)
    report.compare("text tokens", "cond/input_ids", actual=ids, expected=goldens["cond/input_ids"])
    report.compare("text tokens", "cond/attention_mask", actual=mask, expected=goldens["cond/attention_mask"])
    if (stored := goldens.find("cond/t5_mask")) is not None:
        report.compare("text tokens", "cond/t5_mask", actual=real, expected=as_bool(stored))
    tokens = torch.stack([embedding.tokens for embedding in model.encode_text(prompts)])
    report.compare("text in float16", "cond/t5", actual=tokens, expected=goldens["cond/t5"])
    if (stored := goldens.find("cond/t5_fp32")) is not None:
        place = Path(str(model.text.encoder.config._name_or_path))  # type: ignore[union-attr]
        exact = load_text_encoder(place, max_length=model.text.max_length, device=model.device, dtype=torch.float32)
        found = model.prompt(exact.encode(ids, mask), real)
        report.compare("text", "cond/t5_fp32", actual=found, expected=stored)


def _compare_numbers(report: Report, goldens: Goldens, *, model: SaoModel) -> None:
    """Compare cond/<id> of every number conditioner: values of the facts, some beyond its range."""
    values = torch.tensor(goldens.facts.get("cond_number_values", []), dtype=torch.float32)
    for id_, conditioner in model.numbers.items():
        with report.guard("number", id_):
            key = f"cond/{id_}"
            report.compare("number", key, actual=conditioner(values)[:, None], expected=goldens[key])


def _compare_assembly(report: Report, goldens: Goldens, *, model: SaoModel) -> None:
    """Compare the context and the global vector that the network is given for the inputs of the facts."""
    for index, given in enumerate(goldens.facts.get("cond_inputs_batch", [])):
        with report.guard("number", f"cond/inputs[{index}]"):
            request = GenerationRequest(
                prompt=given["prompt"],
                duration_s=1e-3,
                seed=0,
                steps=1,
                start_s=float(given.get("seconds_start", 0)),
                conditioned_total_s=float(given["seconds_total"]),
            )
            context, global_cond = _given_to_network(model, model.plan(request, frames=1)[0])
            stored = goldens["cond/inputs_cross_attn_cond"][index : index + 1]
            report.compare("text in float16", f"cond/inputs_cross_attn_cond[{index}]", actual=context, expected=stored)
            stored = goldens["cond/inputs_global_cond"][index : index + 1]
            report.compare("number", f"cond/inputs_global_cond[{index}]", actual=global_cond, expected=stored)
    goldens.mark("cond/inputs_cross_attn_mask")  # cross-attention takes no mask


def _given_to_network(model: SaoModel, plan: RowPlan) -> tuple[Tensor, Tensor]:
    """Returns the context and the global vector of a planned row as they enter the denoiser."""
    seen: dict[str, Tensor] = {}
    modules = {"context": model.denoiser.to_cond_embed, "global": model.denoiser.to_global_embed}
    handles = [
        module.register_forward_pre_hook(lambda _module, inputs, name=name: seen.setdefault(name, inputs[0].clone()))
        for name, module in modules.items()
    ]
    try:
        (prompt,) = model.encode_text([plan.prompt])
        model.condition(plan, prompt=prompt, negative=None, inpaint_latents=None)
    finally:
        for handle in handles:
            handle.remove()
    return seen["context"], seen["global"]


class _StoredText(ObservedModel):
    """The model with the reference's own prompt tokens, by prompt."""

    def __init__(self, model: SaoModel) -> None:
        super().__init__(model)
        self.tokens: dict[str, Tensor] = {}

    def encode_text(self, prompts: Sequence[str]) -> list[TextEmbedding]:
        return [
            TextEmbedding(prompt, self.tokens[prompt], (self.tokens[prompt] != 0).any(dim=-1)) for prompt in prompts
        ]


class _ReplayedRow:
    """One row's draws of a reference run, whose source was encoded in one piece for all rows."""

    def __init__(self, replay: ReplayNoise, row: int) -> None:
        self._replay, self._row = replay, replay.row(row)

    def initial(self, shape: tuple[int, ...]) -> Tensor:
        return self._row.initial(shape)

    def step(self, shape: tuple[int, ...]) -> Tensor:
        return self._row.step(shape)

    def window(
        self, stage: str, start: int, *, shape: tuple[int, ...], frame_axis: int, device: torch.device
    ) -> Tensor:
        whole = self._replay.draw(stage, 0)[0]
        return whole.narrow(frame_axis, start, shape[frame_axis]).to(device)


async def _compare_cases(report: Report, goldens: Goldens, *, model: SaoModel) -> None:
    """Run every case through the engine, together with the other rows of its batch."""
    for objective, names in _by_objective(goldens, model).items():
        adapted = _with_objective(model, objective)
        observed = _StoredText(adapted)
        runner = Runner(adapted, num_frames=partial(_num_frames, hop=adapted.spec.hop), observed=observed)
        try:
            for name in names:
                with report.guard("end-to-end", name):
                    await _compare_case(report, goldens, name=name, model=adapted, observed=observed, runner=runner)
        finally:
            await runner.close()


def _num_frames(duration_s: float, *, padding_s: float, sample_size: int, hop: int) -> int:
    """The run's window, whatever the clip's duration."""
    return sample_size // hop


def _by_objective(goldens: Goldens, model: SaoModel) -> dict[str, list[str]]:
    """Returns the cases by the objective that the reference ran them with: `gen/rf_...` with another one."""
    found: dict[str, list[str]] = {}
    overrides = "rectified_flow_cases" in goldens.facts
    for name in goldens.cases():
        objective = "rectified_flow" if overrides and name.startswith("gen/rf_") else model.config.objective
        found.setdefault(objective, []).append(name)
    return found


def _with_objective(model: SaoModel, objective: str) -> SaoModel:
    if objective == model.config.objective:
        return model
    config = replace(model.config, objective=objective)
    spec = build_spec(replace(model.spec.card, objective=objective), config)
    parts = SaoComponents(model.text, model.prompt, model.numbers, model.denoiser, model.autoencoder)
    return SaoModel(parts, config=config, spec=spec, device=model.device)


async def _compare_case(
    report: Report, goldens: Goldens, *, name: str, model: SaoModel, observed: _StoredText, runner: Runner
) -> None:
    facts = goldens.cases()[name]
    for key in goldens.names(f"{name}/"):
        goldens.mark(f"{name}/{key}")
    if facts["args"].get("sampler_type") in _REFUSED:
        report.skip("end-to-end", f"{name}: {facts['args']['sampler_type']} chooses its steps from the data")
        return
    case = _to_case(name, facts, goldens=goldens, model=model)
    observed.tokens = _stored_tokens(goldens, case, model=model)
    plans = runner.plan(case)
    if stated := facts.get("trace_sigma"):
        starts = [0, *plans[0].sampler.step_ends[:-1]]
        levels = torch.tensor([plans[0].sampler.evaluations[start].sigma for start in starts])
        report.compare("schedules", f"{name}/trace_sigma", actual=levels / levels[0], expected=_share(stated))
    replay = ReplayNoise(case.seed, _script(case, plans[0], model=model), num_rows=len(plans))
    rows: list[NoiseSource] = [_ReplayedRow(replay, row) for row in range(len(plans))]
    _compare_rows(report, goldens, name=name, results=await runner.run_with(case, rows))


def _share(levels: Sequence[float]) -> Tensor:
    stated = torch.tensor(levels)
    return stated / stated[0]


def _compare_rows(report: Report, goldens: Goldens, *, name: str, results: Sequence[RowResult]) -> None:
    for row, result in enumerate(results):
        pairs: tuple[tuple[Component, str, Tensor], ...] = (
            ("end-to-end latents", f"{name}/latents", result.latents),
            ("end-to-end audio", f"{name}/audio", result.audio),
        )
        for component, key, actual in pairs:
            if (stored := goldens.find(key)) is not None:
                report.compare(component, f"{key}[{row}]", actual=actual, expected=stored[row])


def _to_case(name: str, facts: Mapping[str, Any], *, goldens: Goldens, model: SaoModel) -> Case:
    """Returns the run as requests, whose seeds are their rows' numbers."""
    args = facts["args"]
    negatives = args.get("negative_conditioning") or [{}]
    source = None
    if inputs := facts.get("inputs"):
        source = SourceAudio(goldens[inputs["init_audio"]].numpy(), int(inputs["init_rate"]))
    is_v = model.config.objective == "v"
    sampler, sigma_min, sigma_max = _LIBRARY["v" if is_v else "flow"]
    low, high = args.get("cfg_interval", (0.0, 1.0))
    requests = [
        GenerationRequest(
            prompt=row["prompt"],
            duration_s=int(args["sample_size"]) / model.spec.card.sample_rate_hz,
            seed=index,
            start_s=float(row.get("seconds_start", 0.0)),
            conditioned_total_s=float(row["seconds_total"]),
            negative_prompt=negatives[index % len(negatives)].get("prompt"),
            negative_start_s=negatives[index % len(negatives)].get("seconds_start"),
            negative_total_s=negatives[index % len(negatives)].get("seconds_total"),
            steps=int(args["steps"]),
            cfg_scale=float(args.get("cfg_scale", _LIBRARY_CFG)),
            cfg_interval=(float(low), float(high)),
            sampler=args.get("sampler_type", sampler),
            sigma_min=args.get("sigma_min", sigma_min) if is_v else None,
            sigma_max=args.get("sigma_max", sigma_max),
            rho=args.get("rho"),
            cfg_rescale=float(args.get("scale_phi", 0.0)),
            init_audio=source,
            init_noise_level=float(args.get("init_noise_level", 1.0)),
            edit_schedule=None if is_v else "reference",
        )
        for index, row in enumerate(args["conditioning"])
    ]
    return Case(name, tuple(requests), int(args["seed"]), int(args["sample_size"]), ())


def _stored_tokens(goldens: Goldens, case: Case, *, model: SaoModel) -> dict[str, Tensor]:
    """Returns the prompt tokens that the stored contexts hold, by prompt; numbers are left to the model."""
    config = model.config
    before = config.context_ids.index(config.prompt.id)
    part = slice(before, before + config.prompt.max_length)
    tokens = {
        request.prompt: goldens[f"{case.name}/cross_attn_cond"][row][part] for row, request in enumerate(case.requests)
    }
    negative = goldens.find(f"{case.name}/negative_cross_attn_cond")
    if negative is not None:
        tokens |= {request.negative_prompt or "": negative[row][part] for row, request in enumerate(case.requests)}
    return tokens


def _script(case: Case, plan: RowPlan, *, model: SaoModel) -> list[ReplayDraw | ReplayPath]:
    """Returns the reference's draws in order: the noise, the source encoder's for all rows at once, the sampler's."""
    latent = (len(case.requests), model.spec.card.latent_channels, plan.frames)
    script: list[ReplayDraw | ReplayPath] = [ReplayDraw("initial", 0, latent)]
    if plan.init_source is not None:
        script.append(ReplayDraw(_SOURCE, 0, (1, *latent[1:])))
    if (case.requests[0].sampler or "").endswith("-sde"):
        levels = [plan.sampler.evaluations[start].sigma for start in (0, *plan.sampler.step_ends[:-1])]
        return [*script, ReplayPath((*levels, 0.0), latent)]
    num_steps = sum(evaluation.draws_noise for evaluation in plan.sampler.evaluations)
    return script + [ReplayDraw("step", step, latent) for step in range(num_steps)]
