"""A stored run of the Stable Audio Open family in our vocabulary: requests, prompt tokens and random draws.

Arguments are the reference's own. A run with an unknown argument is skipped, because ignoring the argument would
compare two different runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from stable_audio_serve.core.errors import CheckpointError
from stable_audio_serve.core.generation import GenerationRequest, SourceAudio
from stable_audio_serve.models.protocol import RowPlan
from stable_audio_serve.models.sao.build import build_spec
from stable_audio_serve.models.sao.model import SaoComponents, SaoModel
from stable_audio_serve.sampling import NoiseSource, ReplayDraw, ReplayNoise, ReplayPath
from stable_audio_serve.sampling.samplers import DATA_DEPENDENT
from stable_audio_serve.verification.cases import Case
from stable_audio_serve.verification.goldens import Goldens
from stable_audio_serve.verification.sao_common import sampler_script

SOURCE_DRAW = "init/bottleneck"

# What the reference's call does where a run says nothing: sampler, sigma_min, sigma_max.
_DEFAULTS = {"v": ("dpmpp-2m-sde", 0.01, 100.0), "flow": ("euler", None, None)}
_DEFAULT_CFG_SCALE = 6.0
_KNOWN = {
    "conditioning",
    "negative_conditioning",
    "batch_size",
    "sample_size",
    "seed",
    "steps",
    "cfg_scale",
    "cfg_interval",
    "scale_phi",
    "sampler_type",
    "sigma_min",
    "sigma_max",
    "rho",
    "init_noise_level",
}
_KNOWN_OF_A_ROW = {"prompt", "seconds_start", "seconds_total"}
_OVERRIDE_KEY, _OVERRIDING_OBJECTIVE = "rectified_flow_cases", "rectified_flow"


def skip_reason(args: Mapping[str, Any]) -> str | None:
    """Returns why a run cannot be repeated here, or None."""
    unknown = {name for name, value in args.items() if name not in _KNOWN and value is not None}
    for row in (*args.get("conditioning", ()), *(args.get("negative_conditioning") or ())):
        unknown |= row.keys() - _KNOWN_OF_A_ROW
    if unknown:
        return f"arguments nothing is known about: {', '.join(sorted(unknown))}"
    if args.get("sampler_type") in DATA_DEPENDENT:
        return f"{args['sampler_type']} chooses its steps from the data"
    return "its seed is random" if int(args["seed"]) < 0 else None


def objective_of(name: str, goldens: Goldens, *, trained: str) -> str:
    """Returns the objective that a run had: `trained`, or another where the facts name the run or a pattern of it."""
    stated = goldens.facts.get(_OVERRIDE_KEY, ())
    patterns = [word for word in stated.split() if "/" in word] if isinstance(stated, str) else stated
    return _OVERRIDING_OBJECTIVE if any(fnmatchcase(name, pattern) for pattern in patterns) else trained


def with_objective(model: SaoModel, objective: str) -> SaoModel:
    """Returns the same networks, sampled as if they had been trained for `objective`."""
    if objective == model.config.objective:
        return model
    config = replace(model.config, objective=objective)
    spec = build_spec(replace(model.spec.card, objective=objective), config)
    parts = SaoComponents(model.text, model.prompt, model.numbers, model.denoiser, model.autoencoder)
    return SaoModel(parts, config=config, spec=spec, device=model.device)


def parse_case(name: str, facts: Mapping[str, Any], *, goldens: Goldens, model: SaoModel) -> Case:
    """Returns the run as requests, whose seeds are their rows' numbers.

    Raises CheckpointError when there is not one condition per row.
    """
    args = facts["args"]
    rows = args["conditioning"]
    negatives = args.get("negative_conditioning") or [{}]
    if len(negatives) not in (1, len(rows)) or len(rows) != int(args.get("batch_size", 1)):
        raise CheckpointError(f"golden.json: {name} has another number of conditions than rows")
    negatives = negatives * len(rows) if len(negatives) == 1 else negatives
    source = None
    if inputs := facts.get("inputs"):
        source = SourceAudio(goldens[inputs["init_audio"]].numpy(), int(inputs["init_rate"]))
    is_v = model.config.objective == "v"
    sampler, sigma_min, sigma_max = _DEFAULTS["v" if is_v else "flow"]
    low, high = args.get("cfg_interval", (0.0, 1.0))
    requests = [
        GenerationRequest(
            prompt=row["prompt"],
            duration_s=int(args["sample_size"]) / model.spec.card.sample_rate_hz,
            seed=index,
            start_s=float(row.get("seconds_start", 0.0)),
            conditioned_total_s=float(row["seconds_total"]) if "seconds_total" in row else None,
            negative_prompt=negative.get("prompt"),
            negative_start_s=negative.get("seconds_start"),
            negative_total_s=negative.get("seconds_total"),
            steps=int(args["steps"]),
            cfg_scale=float(args.get("cfg_scale", _DEFAULT_CFG_SCALE)),
            cfg_interval=(float(low), float(high)),
            sampler=args.get("sampler_type", sampler),
            sigma_min=args.get("sigma_min", sigma_min) if is_v else None,
            sigma_max=args.get("sigma_max", sigma_max),
            rho=args.get("rho") if is_v else None,  # flow samplers drop it
            cfg_rescale=float(args.get("scale_phi", 0.0)),
            init_audio=source,
            init_noise_level=float(args.get("init_noise_level", 1.0)),
            edit_schedule=None if is_v else "reference",
        )
        for index, (row, negative) in enumerate(zip(rows, negatives, strict=True))
    ]
    return Case(name, tuple(requests), int(args["seed"]), int(args["sample_size"]), ())


def stored_tokens(goldens: Goldens, case: Case, *, model: SaoModel) -> dict[str, Tensor]:
    """Returns the prompt tokens (T, width) that the stored contexts hold, by prompt; numbers are left to the model."""
    config = model.config
    before = config.context_ids.index(config.prompt.id)
    part = slice(before, before + config.prompt.max_length)
    contexts = goldens[f"{case.name}/cross_attn_cond"]
    tokens = {request.prompt: contexts[row][part] for row, request in enumerate(case.requests)}
    if (negative := goldens.find(f"{case.name}/negative_cross_attn_cond")) is not None:
        tokens |= {request.negative_prompt or "": negative[row][part] for row, request in enumerate(case.requests)}
    return tokens


def draw_script(case: Case, plan: RowPlan, *, model: SaoModel) -> list[ReplayDraw | ReplayPath]:
    """Returns the reference's draws in order: the noise, the source encoder's for all rows at once, the sampler's."""
    latent = (len(case.requests), model.spec.card.latent_channels, plan.frames)
    script: list[ReplayDraw | ReplayPath] = [ReplayDraw("initial", 0, latent)]
    if plan.init_source is not None:
        script.append(ReplayDraw(SOURCE_DRAW, 0, (1, *latent[1:])))
    return script + sampler_script(case.requests[0].sampler or "", plan.sampler, shape=latent)


class ReplayedRow:
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
        """Returns the window's part of the one draw over all frames."""
        whole = self._replay.draw(stage, 0)[0]
        return whole.narrow(frame_axis, start, shape[frame_axis]).to(device)


def replay_rows(case: Case, script: Sequence[ReplayDraw | ReplayPath]) -> list[NoiseSource]:
    """Returns the rows' noise in a new repetition of the run."""
    replay = ReplayNoise(case.seed, script, num_rows=len(case.requests))
    return [ReplayedRow(replay, row) for row in range(len(case.requests))]
