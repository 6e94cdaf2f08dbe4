"""Checks that run no network of a model: draws, schedules, Brownian paths, samplers on formulas, and source audio."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

import torch
from torch import Tensor

from stable_audio_serve.audio.prepare import prepare_source
from stable_audio_serve.core.generation import EditSchedule, SourceAudio
from stable_audio_serve.models.sa3.model import Sa3Model
from stable_audio_serve.sampling.brownian import MAX_ENTROPY, BrownianTree, ReplayPath, brownian_steps
from stable_audio_serve.sampling.karras import SigmaRange, polyexponential_sigmas
from stable_audio_serve.sampling.noise import ReplayDraw, ReplayNoise
from stable_audio_serve.sampling.open_flow import build_open_flow_plan, open_flow_times
from stable_audio_serve.sampling.plan import LATENTS, Guidance, SamplerPlan
from stable_audio_serve.sampling.samplers import DATA_DEPENDENT
from stable_audio_serve.sampling.samplers import SAMPLERS as FLOW_SAMPLERS
from stable_audio_serve.sampling.schedules import shift_from_config
from stable_audio_serve.sampling.update import StepTerms, advance, network_input, start_state
from stable_audio_serve.sampling.v_network import sigma_to_time
from stable_audio_serve.sampling.v_samplers import OVER_TIME, V_SAMPLERS, build_v_plan
from stable_audio_serve.verification.checks import Check, Finding, Subject, same

Calls = Sequence[tuple[Tensor, Tensor]]  # input and guided output (B, D, F) of each network call of a plan
Script = Sequence[ReplayDraw | ReplayPath]

FORMULAS_KEY = "analytic"  # a fact in folders without a model: the formulas of `v_output` and `flow_output`
_VARIANCE = 0.25
_UNGUIDED_SHARE = 0.9  # in the formulas, unconditional output = this share of the guided output
_LAST_DRAWS_UNUSED = ("k-heun", "k-dpm-2", "k-dpm-fast")
_EDIT_LEVELS = (0.01, 0.02, 0.04, 0.3, 1.0)  # noise levels of an edit, from the lowest that requests may use
_NO_SHIFT = shift_from_config({"type": "none"})


def _draws(it: Subject, match: re.Match[str]) -> Iterator[Finding]:
    """Repeat a case's random draws in order from its seed.

    The first four values of each draw are stored. For some draws, all values are stored.
    """
    case = it.goldens.section("cases", match[0])
    seed = case.get("manual_seed", case.get("args", {}).get("seed"))
    if seed is None or seed < 0:
        return
    generator = torch.Generator().manual_seed(seed)
    for index, draw in enumerate(case.get("draws") or []):
        key = f"{match[0]}/draw_{index:02d}"
        if draw["fn"] == "randint":
            drawn = torch.randint(0, MAX_ENTROPY, [], generator=generator)
            yield same(f"{key} integer", draw["value"], found=int(drawn))
            continue
        drawn = torch.randn(draw["shape"], generator=generator)
        yield Finding(f"{key} first values", drawn.flatten()[:4], torch.tensor(draw["first4"]))
        if (stored := it.goldens.find(key)) is not None:
            yield Finding(key, drawn, stored)


def _edit_levels(it: Subject, _: object) -> Iterator[Finding]:
    """Check that an edit starts at the noise level of the request, as in the reference, even at the lowest level."""
    request = it.request(torch.zeros(it.model.spec.card.channels, 2 * it.model.spec.hop))
    for level in _EDIT_LEVELS:
        for schedule in get_args(EditSchedule):
            plan = it.model.plan(replace(request, init_noise_level=level, edit_schedule=schedule))[0].sampler
            found = torch.tensor([plan.source_scale, plan.noise_scale, plan.evaluations[0].sigma])
            yield Finding(f"edit at {level:g}, {schedule}", found, torch.tensor([1 - level, level, level]))


def _levels(it: Subject, match: re.Match[str]) -> Iterator[Finding]:
    """Build a grid over sigma. Compare relative differences, because levels reach 1000."""
    args, stored = it.goldens.section("schedules", match[0]), it.goldens[match[0]]
    found = polyexponential_sigmas(args["steps"], SigmaRange(args["sigma_min"], args["sigma_max"], args["rho"]))
    size = stored.clamp(min=1.0)
    yield Finding(match[0], found / size, stored / size)


def _flow_times(it: Subject, match: re.Match[str]) -> Tensor:
    args = it.goldens.section("schedules", match[0])
    return open_flow_times("euler", args["steps"], level=args["sigma_max"], shift=_NO_SHIFT, length=1)


def _shifted_times(it: Subject, match: re.Match[str]) -> Tensor:
    shift = shift_from_config({"type": "full", "min_length": 256, "max_length": 4096, "use_sine": bool(match[1])})
    return open_flow_times("rk4", len(it.goldens[match[0]]) - 1, level=1.0, shift=shift, length=int(match[2]))


def _path_increment(it: Subject, match: re.Match[str]) -> Tensor:
    tree = it.goldens.section("brownian", "tree")
    start, end, low, high = torch.tensor([tree["t0"], tree["t1"], *tree["spans"][int(match[1])]]).tolist()  # float32
    path = BrownianTree(int(tree["entropy"]), start=start, end=end, shape=tuple(tree["shape"]))
    return path.increment(low, high)


def _path_noise(it: Subject, match: re.Match[str]) -> Tensor:
    """Returns a sampler's noise from Brownian paths: one path for all rows, or one path per row and seed."""
    stated, shape = it.goldens.section("brownian", "sampler"), tuple(it.goldens[match[0]].shape[1:])
    sigmas = it.goldens["brownian/sigmas"].tolist()
    if match[1] != "seed_list":
        return torch.stack(brownian_steps(stated["seed"], sigmas, shape=shape))
    rows = [torch.stack(brownian_steps(seed, sigmas, shape=shape[1:])) for seed in stated["seed_list"]]
    return torch.stack(rows, dim=1)


def _prepare(it: Subject, match: re.Match[str]) -> Tensor:
    """Convert source audio to a model's sample rate, channels and length."""
    facts, channels = it.goldens.section("cases", match[0]), it.goldens[match[0]].shape[1]
    source = SourceAudio(it.goldens["prepare/wave"][: facts["in_channels"]].numpy(), int(facts["in_rate"]))
    length, rate_hz = int(facts["length"]), int(facts["rate"])
    return prepare_source(source, sample_rate_hz=rate_hz, channels=channels, num_samples=length)[None]


def v_output(x: Tensor, t: float) -> Tensor:
    """Returns v0 + 0.2 sin(x) for x (B, D, F) at the float32 time `t`.

    v0 is the exact v for normal data with mean 0.3 cos(channel) and variance 0.25.
    """
    time = torch.tensor(t, dtype=torch.float32)
    alpha, beta = torch.cos(math.pi * time / 2), torch.sin(math.pi * time / 2)
    return _formula(x, alpha, beta=beta, pull=alpha * beta * (1 - _VARIANCE), lean=beta)


def flow_output(x: Tensor, t: float) -> Tensor:
    """Returns u0 + 0.2 sin(x) for x (B, D, F) at the float32 time `t`.

    u0 is the exact flow velocity for the same normal data as in `v_output`.
    """
    time = torch.tensor(t, dtype=torch.float32)
    return _formula(x, 1 - time, beta=time, pull=time - _VARIANCE * (1 - time), lean=1.0)


def _formula(x: Tensor, alpha: Tensor, *, beta: Tensor, pull: Tensor, lean: Tensor | float) -> Tensor:
    mean = 0.3 * torch.cos(torch.arange(x.shape[-2], dtype=torch.float32))[:, None]
    pulled = pull * (x - alpha * mean) / (alpha**2 * _VARIANCE + beta**2)
    return pulled - lean * mean + 0.2 * torch.sin(x)


def _run_plan(
    plan: SamplerPlan, replay: ReplayNoise, *, noise: Tensor, source: Tensor | None, network: Callable[..., Tensor]
) -> tuple[Tensor, Calls]:
    """Run `plan` from `noise` (B, D, F) and, for an edit, `source` (B, D, F). Returns the result and the calls."""
    calls: list[tuple[Tensor, Tensor]] = []
    rows = [replay.row(row) for row in range(len(noise))]
    starts = zip(noise, [None] * len(rows) if source is None else source, strict=True)
    state = torch.stack([start_state(plan, own, source=given) for own, given in starts])
    for call in plan.evaluations:
        terms = StepTerms.of([call] * len(rows))
        seen = network_input(state, terms)
        calls.append((seen, made := network(seen, call.t)))
        unguided = _UNGUIDED_SHARE * made if any(call.b_uncond) else None
        drawn = torch.stack([row.step(tuple(noise.shape[1:])) for row in rows]) if call.draws_noise else None
        state = advance(state, terms, velocity=made, unconditional=unguided, noise=drawn)
    return state[:, LATENTS], calls


def compare_steps(
    prefix: str, plan: SamplerPlan, *, calls: Calls, result: Tensor, sampler: str, sigmas: Sequence[float], it: Subject
) -> Iterator[Finding]:
    """Compare x and the clean estimate of the steps at the noise levels `sigmas`. Stored keys begin with `prefix`.

    `result` (B, D, F) is x after the last step. The stored x is what the reference's callback reported: x after a step
    for Euler, RK4 and all but the last step of DDIM, and x before a step otherwise. The stored estimate is from a
    step's first network call, or for RK4 from the step's last network call.
    """
    firsts, near = (0, *plan.step_ends[:-1]), step_levels(plan)[:, None].isclose(torch.tensor(sigmas), rtol=2e-6)
    starts = [calls[first][0] / plan.evaluations[first].input_scale for first in firsts]
    steps = zip(firsts, plan.step_ends, starts, (*starts[1:], result), strict=True)
    chosen = [step for step, found in zip(steps, near.any(dim=1), strict=True) if found]
    stored = zip(it.goldens[f"{prefix}x"], it.goldens[f"{prefix}denoised"], strict=True)
    for index, ((first, stop, x, after), (wanted, denoised)) in enumerate(zip(chosen, stored, strict=True)):
        call, (seen, output) = plan.evaluations[first], calls[first]
        if sampler == "rk4":
            call, seen, output = plan.evaluations[stop - 1], after, calls[stop - 1][1]
        angle = call.t * math.pi / 2
        clean, noise = (1.0, call.t) if sampler in FLOW_SAMPLERS else (math.cos(angle), math.sin(angle))
        is_after = sampler in ("euler", "rk4") or (sampler in OVER_TIME and stop < len(calls))
        size = max(1.0, float(wanted.abs().max()))  # at sigma = 500, |x| reaches 1000 and rounding moves the estimate
        yield Finding(f"{prefix}x[{index}]", (after if is_after else x) / size, wanted / size)
        yield Finding(f"{prefix}denoised[{index}]", (clean * seen - noise * output) / size, denoised / size)


def step_levels(plan: SamplerPlan) -> Tensor:
    """Returns the noise level at which each step begins."""
    return torch.tensor([plan.evaluations[first].sigma for first in (0, *plan.step_ends[:-1])])


def sampler_script(sampler: str, plan: SamplerPlan, *, shape: tuple[int, ...]) -> Script:
    """Returns the draws of the reference's sampler that affect its result. `shape` is (B, D, F)."""
    if sampler.endswith("-sde"):
        return [ReplayPath((*step_levels(plan).tolist(), 0.0), shape)]
    return [ReplayDraw("step", step, shape) for step in range(sum(call.draws_noise for call in plan.evaluations))]


def compare_script(name: str, script: Script, *, facts: Mapping[str, Any], sampler: str) -> Iterator[Finding]:
    """Compare the number, kind and shape of the draws with the draws of the reference.

    Some of the reference's samplers end with draws that they do not use. These are not compared.
    """
    if (draws := facts.get("draws")) is not None:
        found = [() if isinstance(entry, ReplayPath) else entry.shape for entry in script]
        stored = [tuple(draw["shape"]) for draw in draws[: len(found) if sampler in _LAST_DRAWS_UNUSED else None]]
        yield same(f"{name} number and shapes", stored, found=found, component="draws")


def _run_sampler(it: Subject, match: re.Match[str]) -> Iterator[Finding | str]:
    """Run a sampler. Compare the shapes of its draws, its steps and its result."""
    name, goldens, facts = match[0], it.goldens, it.goldens.section("cases", match[0])
    goldens.matching(re.escape(name) + "/.*")
    noise, sampler = goldens["sampler/noise"], facts["args"]["sampler_type"]
    if sampler in DATA_DEPENDENT:
        yield f"{name}: {sampler} chooses its steps from the data"
        return
    source = goldens["sampler/init"] if name.endswith("_init") else None
    plan = _plan(facts["args"], has_source=source is not None, frames=noise.shape[-1])
    script = sampler_script(sampler, plan, shape=tuple(noise.shape))
    yield from compare_script(name, script, facts=facts, sampler=sampler)
    replay = ReplayNoise(int(facts["manual_seed"]), script, num_rows=len(noise))
    network = v_output if sampler in V_SAMPLERS else flow_output
    made, calls = _run_plan(plan, replay, noise=noise, source=source, network=network)
    yield from compare_steps(f"{name}/", plan, calls=calls, result=made, sampler=sampler, sigmas=facts["sigma"], it=it)
    size = max(1.0, float(goldens[f"{name}/x"][-1].abs().max()))
    yield Finding(f"{name}/out", made / size, goldens[f"{name}/out"] / size)


def _plan(args: Mapping[str, Any], *, has_source: bool, frames: int) -> SamplerPlan:
    sampler, steps, shift = args["sampler_type"], int(args["steps"]), _NO_SHIFT
    if sampler in V_SAMPLERS:
        span = SigmaRange(args["sigma_min"], args["sigma_max"])
        # A scale other than 1 makes CFG++ request the unconditional branch. The formula already is the guided output.
        guidance = Guidance(cfg_scale=2.0 if sampler == "v-ddim-cfgpp" else 1.0)
        return build_v_plan(sampler, steps, span=span, guidance=guidance, has_source=has_source)
    if stated := args.get("dist_shift"):
        low, high = map(int, re.findall(r"\d+", stated))  # "min 256, max 4096"
        shift = shift_from_config({"type": "full", "min_length": low, "max_length": high})
    times = open_flow_times(sampler, steps, level=args.get("sigma_max", 1.0), shift=shift, length=frames)
    return build_open_flow_plan(sampler, times, guidance=Guidance(), has_source=has_source)


SAMPLERS = (
    Check("schedules", "edit levels", _edit_levels, over="once", family=Sa3Model),
    Check("schedules", "schedule/polyexp_.*", _levels),
    Check("schedules", "schedule/rf_.*", _flow_times),
    Check("schedules", r"schedule/dist_shift_(sine_)?(\d+)", _shifted_times),
    Check("schedules", "schedule/v_sigma_to_t", lambda it, _: sigma_to_time(it.goldens["schedule/v_sigma"])),
    Check("inputs", "sampler/(noise|init)|prepare/wave|brownian/sigmas|schedule/v_sigma", lambda *_: ()),
    Check("draws", ".*", _draws, over="cases"),
    Check("Brownian paths", r"brownian/tree_(\d+)", _path_increment),
    Check("Brownian paths", "brownian/sampler_(f32|one_row|seed_list)", _path_noise),
    Check("Brownian paths", "brownian/sampler_f16", lambda _, key: [f"{key[0]}: noise is drawn in float32 here"]),
    Check("source preparation", "prepare/(?!wave).*", _prepare),
    Check("samplers over sigma", "sampler/(dpmpp|k-(?!heun)).*", _run_sampler, over="cases"),
    Check("Heun over sigma", "sampler/k-heun.*", _run_sampler, over="cases"),
    Check("samplers over time", "sampler/(rf|v-ddim).*", _run_sampler, over="cases"),
)
