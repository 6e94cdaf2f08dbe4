"""Checks of the Stable Audio Open family that need no checkpoint: samplers, schedules, Brownian paths, source audio.

A sampler's plan runs step by step outside the engine, and every step is compared with the stored one. Folders with
these numbers have no model. Their networks are formulas, written in the facts under `FORMULAS_KEY`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stable_audio_serve.audio.prepare import prepare_source
from stable_audio_serve.core.errors import CheckpointError
from stable_audio_serve.core.generation import SourceAudio
from stable_audio_serve.sampling import (
    SAMPLERS,
    V_SAMPLERS,
    Guidance,
    ReplayDraw,
    ReplayNoise,
    ReplayPath,
    SamplerPlan,
    SigmaRange,
    StepTerms,
    advance,
    build_open_flow_plan,
    build_v_plan,
    network_input,
    open_flow_times,
    shift_from_config,
    start_state,
)
from stable_audio_serve.sampling.brownian import BrownianTree, brownian_steps
from stable_audio_serve.sampling.karras import polyexponential_sigmas
from stable_audio_serve.sampling.samplers import DATA_DEPENDENT
from stable_audio_serve.sampling.v_network import sigma_to_time
from stable_audio_serve.sampling.v_samplers import OVER_TIME
from stable_audio_serve.verification.checks import Check, Finding, Subject, same
from stable_audio_serve.verification.goldens import Goldens

# x (B, D, F), float32 time of all rows -> output (B, D, F), either guided or of the unconditional branch.
Network = Callable[[Tensor, float], Tensor]
Script = Sequence[ReplayDraw | ReplayPath]

FORMULAS_KEY = "analytic"
_FORMULAS = {
    "v": "s=0.5; m_c=0.3*cos(c); a=cos(pi t/2); b=sin(pi t/2);"
    " v = a*b*(1-s^2)*(x-a*m)/(a^2 s^2+b^2) - b*m + 0.2*sin(x)",
    "rf": "s=0.5; m_c=0.3*cos(c); a=1-t; v = (t-s^2*a)*(x-a*m)/(a^2 s^2+t^2) - m + 0.2*sin(x)",
}
_VARIANCE = 0.25
_UNGUIDED_SHARE = 0.9  # in the formulas, unconditional output = this share of the guided output
_LAST_DRAWS_UNUSED = ("k-heun", "k-dpm-2", "k-dpm-fast")


def v_output(x: Tensor, t: float) -> Tensor:
    """Returns v of x (B, D, F) at the float32 time `t`.

    This is the exact v for normal data with mean 0.3 cos(channel) and variance 0.25, plus 0.2 sin(x).
    """
    time = torch.tensor(t, dtype=torch.float32)
    alpha, beta, mean = torch.cos(math.pi * time / 2), torch.sin(math.pi * time / 2), _channel_means(x)
    pull = alpha * beta * (1 - _VARIANCE) * (x - alpha * mean) / (alpha**2 * _VARIANCE + beta**2)
    return pull - beta * mean + 0.2 * torch.sin(x)


def flow_output(x: Tensor, t: float) -> Tensor:
    """Returns the flow velocity of x (B, D, F) at the float32 time `t`, for the data of `v_output`."""
    time = torch.tensor(t, dtype=torch.float32)
    alpha, mean = 1 - time, _channel_means(x)
    pull = (time - _VARIANCE * alpha) * (x - alpha * mean) / (alpha**2 * _VARIANCE + time**2)
    return pull - mean + 0.2 * torch.sin(x)


def _channel_means(x: Tensor) -> Tensor:
    return 0.3 * torch.cos(torch.arange(x.shape[-2], dtype=torch.float32))[:, None]


@dataclass(frozen=True, slots=True)
class StepPoint:
    """One step: noise level, x (B, D, F) before it, time and output of each network call, x after it (`following`)."""

    sigma: float
    x: Tensor
    calls: Sequence[tuple[float, Tensor]]
    following: Tensor

    def reported(self, sampler: str, *, is_last: bool) -> tuple[Tensor, Tensor]:
        """Returns x and the clean estimate that the reference's callback reports for this step.

        | Sampler | x | Network output |
        |---|---|---|
        | Euler of flow models | after the step | first call |
        | RK4 of flow models | after the step | last call |
        | DDIM | after the step; before it in the last step, which does not change x | first call |
        | other | before the step | first call |
        """
        t, velocity = self.calls[0]
        if sampler == "rk4":
            t, velocity = self.calls[-1]
            return self.following, self.following - t * velocity
        if sampler in SAMPLERS:
            return self.following if sampler == "euler" else self.x, self.x - t * velocity
        if sampler in OVER_TIME:
            angle = t * math.pi / 2
            return self.x if is_last else self.following, self.x * math.cos(angle) - velocity * math.sin(angle)
        variance = self.sigma**2 + 1
        return self.x, self.x / variance - velocity * (self.sigma / math.sqrt(variance))


def walk_plan(
    plan: SamplerPlan, replay: ReplayNoise, *, noise: Tensor, source: Tensor | None, network: Network, unguided: Network
) -> list[StepPoint]:
    """Run `plan` from `noise` (B, D, F) and, for an edit, `source` (B, D, F). Returns its steps."""
    rows = [replay.row(row) for row in range(len(noise))]
    sources = [None] * len(rows) if source is None else list(source)
    state = torch.stack([start_state(plan, own, source=start) for own, start in zip(noise, sources, strict=True)])
    points = []
    for first, stop in zip((0, *plan.step_ends[:-1]), plan.step_ends, strict=True):
        x, made = state[:, plan.start_register], []
        for call in plan.evaluations[first:stop]:
            terms = StepTerms.of([call] * len(rows))
            seen = network_input(state, terms)
            made.append((call.t, network(seen, call.t)))
            state = advance(
                state,
                terms,
                velocity=made[-1][1],
                unconditional=unguided(seen, call.t) if any(call.b_uncond) else None,
                noise=torch.stack([row.step(tuple(noise.shape[1:])) for row in rows]) if call.draws_noise else None,
            )
        points.append(StepPoint(plan.evaluations[first].sigma, x, made, state[:, plan.result_register]))
    return points


def compare_steps(
    points: Sequence[StepPoint], prefix: str, *, sampler: str, sigmas: Sequence[float], goldens: Goldens
) -> Iterator[Finding]:
    """Yields x and the clean estimate at the noise levels `sigmas`, in falling order. Stored keys begin with `prefix`.

    Raises ValueError if the run has no step at a level.
    """
    stored, left = {part: goldens[prefix + part] for part in ("x", "denoised")}, iter(points)
    for step, sigma in enumerate(sigmas):
        point = next((point for point in left if math.isclose(point.sigma, sigma, rel_tol=2e-6)), None)
        if point is None:
            raise ValueError(f"the run has no step at noise level {sigma:g}")
        # At sigma = 500, |x| reaches 1000 and the clean estimate depends on the last bits of x.
        size = _size(stored["x"][step])
        for part, found in zip(stored, point.reported(sampler, is_last=point is points[-1]), strict=True):
            yield Finding(f"{prefix}{part}[{step}]", found / size, stored[part][step] / size)


def _size(x: Tensor) -> float:
    return max(1.0, float(x.abs().max()))


def step_levels(plan: SamplerPlan) -> Tensor:
    """Returns the noise level at which each step begins."""
    return torch.tensor([plan.evaluations[first].sigma for first in (0, *plan.step_ends[:-1])])


def sampler_script(sampler: str, plan: SamplerPlan, *, shape: tuple[int, ...]) -> Script:
    """Returns the draws of the reference's sampler that affect its result. `shape` is (B, D, F)."""
    if sampler.endswith("-sde"):
        return [ReplayPath((*step_levels(plan).tolist(), 0.0), shape)]
    return [ReplayDraw("step", step, shape) for step in range(sum(call.draws_noise for call in plan.evaluations))]


def compare_script(name: str, script: Script, *, facts: Mapping[str, Any], sampler: str) -> Iterator[Finding]:
    """Compare number, kind and shape of the draws with the reference.

    Ignores extra draws at the end of the reference's list for samplers that do not use them.
    """
    if (draws := facts.get("draws")) is not None:
        found = [() if isinstance(entry, ReplayPath) else entry.shape for entry in script]
        stored = [tuple(draw["shape"]) for draw in draws]
        stored = stored[: len(found)] if sampler in _LAST_DRAWS_UNUSED else stored
        yield same(f"{name} number and shapes", stored, found=found, component="draws")


def _levels(it: Subject, match: re.Match[str]) -> Iterator[Finding]:
    """Build a grid over sigma. Compare relative differences, because levels reach 1000."""
    args, stored = it.goldens.section("schedules", match[0]), it.goldens[match[0]]
    found = polyexponential_sigmas(args["steps"], SigmaRange(args["sigma_min"], args["sigma_max"], args["rho"]))
    size = stored.clamp(min=1.0)
    yield Finding(match[0], found / size, stored / size)


def _flow_times(it: Subject, match: re.Match[str]) -> Tensor:
    args, shift = it.goldens.section("schedules", match[0]), shift_from_config({"type": "none"})
    return open_flow_times("euler", args["steps"], level=args["sigma_max"], shift=shift, length=1)


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


def _run_sampler(it: Subject, match: re.Match[str]) -> Iterator[Finding | str]:
    """Run a sampler. Compare its draws, x and the clean estimate at every step, and the result."""
    name, goldens, facts = match[0], it.goldens, it.goldens.section("cases", match[0])
    goldens.matching(re.escape(name) + "/.*")
    noise, sampler = goldens["sampler/noise"], facts["args"]["sampler_type"]
    if goldens.section(FORMULAS_KEY) != _FORMULAS:
        raise CheckpointError(f"golden.json: {FORMULAS_KEY} states formulas nothing is known about")
    if sampler in DATA_DEPENDENT:
        yield f"{name}: {sampler} chooses its steps from the data"
        return
    source = goldens["sampler/init"] if name.endswith("_init") else None
    plan, network = _plan(facts["args"], has_source=source is not None, frames=noise.shape[-1])
    script = sampler_script(sampler, plan, shape=tuple(noise.shape))
    yield from compare_script(name, script, facts=facts, sampler=sampler)
    replay = ReplayNoise(int(facts["manual_seed"]), script, num_rows=len(noise))

    def unguided(x: Tensor, t: float) -> Tensor:
        return _UNGUIDED_SHARE * network(x, t)

    points = walk_plan(plan, replay, noise=noise, source=source, network=network, unguided=unguided)
    yield from compare_steps(points, f"{name}/", sampler=sampler, sigmas=facts["sigma"], goldens=goldens)
    size = _size(goldens[f"{name}/x"][-1])
    yield Finding(f"{name}/out", points[-1].following / size, goldens[f"{name}/out"] / size)


def _plan(args: Mapping[str, Any], *, has_source: bool, frames: int) -> tuple[SamplerPlan, Network]:
    """Returns the plan of a case and the formula that replaces its network."""
    sampler, steps, stated = args["sampler_type"], int(args["steps"]), args.get("dist_shift")
    if sampler in V_SAMPLERS:
        span = SigmaRange(args["sigma_min"], args["sigma_max"])
        # A scale other than 1 makes CFG++ request the unconditional branch. The formula already is the guided output.
        guidance = Guidance(cfg_scale=2.0 if sampler == "v-ddim-cfgpp" else 1.0)
        return build_v_plan(sampler, steps, span=span, guidance=guidance, has_source=has_source), v_output
    shift = shift_from_config({"type": "none"})
    if stated is not None:
        low, high = map(int, re.findall(r"\d+", stated))  # "min 256, max 4096"
        shift = shift_from_config({"type": "full", "min_length": low, "max_length": high})
    times = open_flow_times(sampler, steps, level=args.get("sigma_max", 1.0), shift=shift, length=frames)
    return build_open_flow_plan(sampler, times, guidance=Guidance(), has_source=has_source), flow_output


def _prepare(it: Subject, match: re.Match[str]) -> Tensor:
    """Convert source audio to a model's sample rate, channels and length."""
    facts, channels = it.goldens.section("cases", match[0]), it.goldens[match[0]].shape[1]
    source = SourceAudio(it.goldens["prepare/wave"][: facts["in_channels"]].numpy(), int(facts["in_rate"]))
    length, rate_hz = int(facts["length"]), int(facts["rate"])
    return prepare_source(source, sample_rate_hz=rate_hz, channels=channels, num_samples=length)[None]


COMMON_CHECKS = (
    Check("inputs", "sampler/(noise|init)|prepare/wave|brownian/sigmas|schedule/v_sigma", lambda *_: ()),
    Check("schedules", "schedule/polyexp_.*", _levels),
    Check("schedules", "schedule/rf_.*", _flow_times),
    Check("schedules", r"schedule/dist_shift_(sine_)?(\d+)", _shifted_times),
    Check("schedules", "schedule/v_sigma_to_t", lambda it, _: sigma_to_time(it.goldens["schedule/v_sigma"])),
    Check("Brownian paths", r"brownian/tree_(\d+)", _path_increment),
    Check("Brownian paths", "brownian/sampler_(f32|one_row|seed_list)", _path_noise),
    Check("Brownian paths", "brownian/sampler_f16", lambda _, key: [f"{key[0]}: noise is drawn in float32 here"]),
    Check("samplers over sigma", "sampler/(dpmpp|k-(?!heun)).*", _run_sampler, over="cases"),
    Check("Heun over sigma", "sampler/k-heun.*", _run_sampler, over="cases"),
    Check("samplers over time", "sampler/(rf|v-ddim).*", _run_sampler, over="cases"),
    Check("source preparation", "prepare/(?!wave).*", _prepare),
)
