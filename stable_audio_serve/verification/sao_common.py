"""Compares what needs no checkpoint of the Stable Audio Open family: schedules, Brownian paths, samplers on two
networks that are formulas, and the preparation of source audio.

Folders with such numbers hold no model; they are recognised by the formulas that they state.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stable_audio_serve.audio.prepare import prepare_source
from stable_audio_serve.core.errors import CheckpointError
from stable_audio_serve.core.generation import SourceAudio
from stable_audio_serve.sampling import (
    V_SAMPLERS,
    Guidance,
    ReplayDraw,
    ReplayNoise,
    ReplayPath,
    SamplerPlan,
    SigmaRange,
    TimestepShift,
    build_open_flow_plan,
    build_v_plan,
    open_flow_times,
    shift_from_config,
)
from stable_audio_serve.sampling.brownian import BrownianTree, brownian_steps
from stable_audio_serve.sampling.karras import polyexponential_sigmas
from stable_audio_serve.sampling.samplers import DATA_DEPENDENT
from stable_audio_serve.sampling.v_network import sigma_to_time
from stable_audio_serve.sampling.v_samplers import OVER_TIME
from stable_audio_serve.verification.bounds import Component
from stable_audio_serve.verification.goldens import Goldens
from stable_audio_serve.verification.report import Report
from stable_audio_serve.verification.stepping import Network, trace, walk_plan
from stable_audio_serve.verification.tables import compare_draws

FORMULAS_KEY = "analytic"
_FORMULAS = {
    "v": "s=0.5; m_c=0.3*cos(c); a=cos(pi t/2); b=sin(pi t/2);"
    " v = a*b*(1-s^2)*(x-a*m)/(a^2 s^2+b^2) - b*m + 0.2*sin(x)",
    "rf": "s=0.5; m_c=0.3*cos(c); a=1-t; v = (t-s^2*a)*(x-a*m)/(a^2 s^2+t^2) - m + 0.2*sin(x)",
}
_VARIANCE = 0.25
_UNGUIDED_SHARE = 0.9  # the other branch of the formulas is this much of the guided output

_FLOW_TIMES, _SHIFTED = (
    re.compile(r"schedule/rf_.*"),
    re.compile(r"schedule/dist_shift_(?P<sine>sine_)?(?P<frames>\d+)"),
)
_NUM_SHIFTED_STEPS = 8
_SHIFT = {"type": "full", "min_length": 256, "max_length": 4096}
_SHIFT_TEXT = re.compile(r"min (?P<low>\d+), max (?P<high>\d+)")
_SOURCE_SUFFIX = "_init"


def compare_common(report: Report, goldens: Goldens) -> None:
    """Compare everything in the folder; an error in one part does not stop the others."""
    parts: dict[str, Callable[[], None]] = {
        "schedules": lambda: _compare_schedules(report, goldens),
        "Brownian paths": lambda: _compare_paths(report, goldens),
        "draws": lambda: compare_draws(report, goldens),
        "samplers over sigma": lambda: _compare_samplers(report, goldens),
        "source preparation": lambda: _compare_preparation(report, goldens),
    }
    for part, compare in parts.items():
        with report.guard(part):
            compare()


def v_output(x: Tensor, t: float) -> Tensor:
    """Returns v of x (B, D, F) at the float32 time `t`: data normal around 0.3 cos(channel), bent by 0.2 sin x."""
    time = torch.tensor(t, dtype=torch.float32)
    alpha, beta, mean = torch.cos(math.pi * time / 2), torch.sin(math.pi * time / 2), _channel_means(x)
    pull = alpha * beta * (1 - _VARIANCE) * (x - alpha * mean) / (alpha**2 * _VARIANCE + beta**2)
    return pull - beta * mean + 0.2 * torch.sin(x)


def flow_output(x: Tensor, t: float) -> Tensor:
    """Returns the flow velocity of x (B, D, F) at the float32 time `t` for the same data."""
    time = torch.tensor(t, dtype=torch.float32)
    alpha, mean = 1 - time, _channel_means(x)
    pull = (time - _VARIANCE * alpha) * (x - alpha * mean) / (alpha**2 * _VARIANCE + time**2)
    return pull - mean + 0.2 * torch.sin(x)


def _channel_means(x: Tensor) -> Tensor:
    return 0.3 * torch.cos(torch.arange(x.shape[-2], dtype=torch.float32))[:, None]


def _compare_schedules(report: Report, goldens: Goldens) -> None:
    """Compare the grids over sigma, the flow models' times, the warped ones, and the time of a sigma."""
    for key, args in goldens.section("schedules").items():
        with report.guard("schedules", key):
            if _FLOW_TIMES.fullmatch(key):
                found = open_flow_times(
                    "euler", args["steps"], level=args["sigma_max"], shift=shift_from_config({"type": "none"}), length=1
                )
            else:
                span = SigmaRange(args["sigma_min"], args["sigma_max"], args["rho"])
                found = polyexponential_sigmas(args["steps"], span)
            # Levels reach 1000, so they are compared by their size.
            stored = goldens[key]
            scale = stored.clamp(min=1.0)
            report.compare("schedules", key, actual=found / scale, expected=stored / scale)
    for name in goldens.names("schedule/"):
        key = f"schedule/{name}"
        if match := _SHIFTED.fullmatch(key):
            shift = shift_from_config({**_SHIFT, "use_sine": bool(match["sine"])})
            frames = int(match["frames"])
            found = open_flow_times("rk4", _NUM_SHIFTED_STEPS, level=1.0, shift=shift, length=frames)
            report.compare("schedules", key, actual=found, expected=goldens[key])
    if (sigmas := goldens.find("schedule/v_sigma")) is not None:
        key = "schedule/v_sigma_to_t"
        report.compare("schedules", key, actual=sigma_to_time(sigmas), expected=goldens[key])


def _compare_paths(report: Report, goldens: Goldens) -> None:
    """Compare increments of a path over spans, and the noise that a sampler gets from it, for one row and several."""
    stated = goldens.section("brownian")
    tree = stated["tree"]
    start, end = (_as_float32(tree[edge]) for edge in ("t0", "t1"))
    path = BrownianTree(int(tree["entropy"]), start=start, end=end, shape=tuple(tree["shape"]))
    for index, span in enumerate(tree["spans"]):
        key = f"brownian/tree_{index}"
        low, high = map(_as_float32, span)
        report.compare("Brownian paths", key, actual=path.increment(low, high), expected=goldens[key])
    sampler, sigmas = stated["sampler"], goldens["brownian/sigmas"].tolist()
    for key in ("brownian/sampler_f32", "brownian/sampler_one_row"):
        stored = goldens[key]
        drawn = torch.stack(brownian_steps(sampler["seed"], sigmas, shape=tuple(stored.shape[1:])))
        report.compare("Brownian paths", key, actual=drawn, expected=stored)
    stored = goldens["brownian/sampler_seed_list"]
    rows = [torch.stack(brownian_steps(seed, sigmas, shape=tuple(stored.shape[2:]))) for seed in sampler["seed_list"]]
    drawn = torch.stack(rows, dim=1)
    report.compare("Brownian paths", "brownian/sampler_seed_list", actual=drawn, expected=stored)
    if "brownian/sampler_f16" in goldens:
        goldens.mark("brownian/sampler_f16")
        report.skip("Brownian paths", "brownian/sampler_f16: noise is drawn in float32 here")


def _compare_samplers(report: Report, goldens: Goldens) -> None:
    """Compare every sampler's run with its stored result, and with x and the clean estimate at every step."""
    if goldens.section(FORMULAS_KEY) != _FORMULAS:
        raise CheckpointError(f"golden.json: {FORMULAS_KEY} states formulas nothing is known about")
    for name, facts in goldens.section("cases").items():
        if not name.startswith("sampler/"):
            continue
        sampler = facts["args"]["sampler_type"]
        component = _component(sampler)
        with report.guard(component, name):
            for part in goldens.names(f"{name}/"):
                goldens.mark(f"{name}/{part}")
            if sampler in DATA_DEPENDENT:
                report.skip("samplers over sigma", f"{name}: {sampler} chooses its steps from the data")
                continue
            _compare_sampler(report, goldens, name=name, facts=facts, component=component)


def _component(sampler: str) -> Component:
    if sampler == "k-heun":
        return "Heun over sigma"
    return "samplers over sigma" if sampler in V_SAMPLERS and sampler not in OVER_TIME else "samplers over time"


def _compare_sampler(
    report: Report, goldens: Goldens, *, name: str, facts: Mapping[str, Any], component: Component
) -> None:
    args, noise = facts["args"], goldens["sampler/noise"]
    sampler, num_rows = args["sampler_type"], len(noise)
    source = goldens["sampler/init"] if name.endswith(_SOURCE_SUFFIX) else None
    plan, network = _plan(args, has_source=source is not None, frames=noise.shape[-1])
    script = sampler_script(sampler, plan, shape=tuple(noise.shape))
    if (draws := facts.get("draws")) is not None:
        compare_script(report, name, script=script, draws=draws, sampler=sampler)
    replay = ReplayNoise(int(facts["manual_seed"]), script, num_rows=num_rows)
    walk = walk_plan(
        plan,
        [replay.row(row) for row in range(num_rows)],
        noise=noise,
        source=source,
        network=network,
        unguided=lambda x, t: _UNGUIDED_SHARE * network(x, t),
    )
    before = goldens[f"{name}/x"]
    for step, traced in enumerate(trace(walk, sampler, sigmas=facts["sigma"])):
        # At sigma = 500 an x of 1000 leaves the clean estimate that x's last bits decide.
        size = max(1.0, float(before[step].abs().max()))
        for part, actual in (("x", traced.x), ("denoised", traced.denoised)):
            stored = goldens[f"{name}/{part}"][step]
            report.compare(component, f"{name}/{part}[{step}]", actual=actual / size, expected=stored / size)
    size = max(1.0, float(before[-1].abs().max()))
    report.compare(component, f"{name}/out", actual=walk.result / size, expected=goldens[f"{name}/out"] / size)


def _plan(args: Mapping[str, Any], *, has_source: bool, frames: int) -> tuple[SamplerPlan, Network]:
    """Returns a case's plan and the formula it runs."""
    sampler, steps = args["sampler_type"], int(args["steps"])
    if sampler in V_SAMPLERS:
        span = SigmaRange(args["sigma_min"], args["sigma_max"])
        # Any scale but 1 makes CFG++ ask for the other branch; the formula is the guided output itself.
        guidance = Guidance(cfg_scale=2.0 if sampler == "v-ddim-cfgpp" else 1.0)
        return build_v_plan(sampler, steps, span=span, guidance=guidance, has_source=has_source), v_output
    times = open_flow_times(
        sampler, steps, level=args.get("sigma_max", 1.0), shift=_shift(args.get("dist_shift")), length=frames
    )
    return build_open_flow_plan(sampler, times, guidance=Guidance(), has_source=has_source), flow_output


def _shift(stated: str | None) -> TimestepShift:
    if stated is None:
        return shift_from_config({"type": "none"})
    match = _SHIFT_TEXT.fullmatch(stated)
    if match is None:
        raise ValueError(f"shift {stated!r} is not known")
    return shift_from_config({"type": "full", "min_length": int(match["low"]), "max_length": int(match["high"])})


def sampler_script(sampler: str, plan: SamplerPlan, *, shape: tuple[int, ...]) -> list[ReplayDraw | ReplayPath]:
    """Returns the draws of the reference's sampler that count, over the whole batch's `shape`."""
    if sampler.endswith("-sde"):
        levels = [plan.evaluations[start].sigma for start in (0, *plan.step_ends[:-1])]
        return [ReplayPath((*levels, 0.0), shape)]
    num_draws = sum(evaluation.draws_noise for evaluation in plan.evaluations)
    return [ReplayDraw("step", step, shape) for step in range(num_draws)]


def compare_script(
    report: Report,
    name: str,
    *,
    script: list[ReplayDraw | ReplayPath],
    draws: Sequence[Mapping[str, Any]],
    sampler: str,
) -> None:
    """Compare number, kind and shape of the draws with the reference's, whose last ones may be of no effect."""
    found = [() if isinstance(entry, ReplayPath) else entry.shape for entry in script]
    stored = [tuple(draw["shape"]) for draw in draws]
    stored = stored[: len(found)] if sampler in _DRAWS_IN_VAIN else stored
    report.note("draws", f"{name} number and shapes", difference=0.0 if found == stored else math.inf)


_DRAWS_IN_VAIN = ("k-heun", "k-dpm-2", "k-dpm-fast")


def _compare_preparation(report: Report, goldens: Goldens) -> None:
    """Compare source audio at the model's rate, channels and length with the reference's."""
    wave = goldens["prepare/wave"]
    for name, facts in goldens.section("cases").items():
        if not name.startswith("prepare/"):
            continue
        with report.guard("source preparation", name):
            stored = goldens[name]
            source = SourceAudio(wave[: facts["in_channels"]].numpy(), int(facts["in_rate"]))
            found = prepare_source(
                source, sample_rate_hz=int(facts["rate"]), channels=stored.shape[1], num_samples=int(facts["length"])
            )
            report.compare("source preparation", name, actual=found[None], expected=stored)


def _as_float32(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float32))
