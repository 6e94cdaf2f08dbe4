"""An engine with a whole checkpoint, including its text encoder, reproduces runs of the reference code."""

from __future__ import annotations

import asyncio
import json
import shutil
from functools import cache
from itertools import starmap
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from stable_audio_serve.core.generation import GenerationRequest, Mode, SourceAudio
from stable_audio_serve.engine.engine import Engine
from stable_audio_serve.engine.options import EngineOptions
from stable_audio_serve.models.families import load_model
from stable_audio_serve.models.protocol import DiffusionModel
from stable_audio_serve.models.registry import resolve_entry
from stable_audio_serve.models.sao.model import SaoModel
from stable_audio_serve.sampling.brownian import ReplayPath
from stable_audio_serve.sampling.karras import SigmaRange, polyexponential_sigmas
from stable_audio_serve.sampling.noise import ReplayDraw, ReplayNoise
from tests.goldens import load_open_goldens
from tests.models.sao.tiny import TINY
from tests.parameters import slow

pytestmark = pytest.mark.server

HOP = 64
TOLERANCE = 5e-4
CASES = [
    (name, case)
    for name in TINY
    for case, facts in load_open_goldens(name).facts["cases"].items()
    if facts["args"].get("sampler_type") != "k-dpm-adaptive"
]
V_CASES = [case for case in CASES if case[0] == "tiny-1.0"]
FLOW_CASES = [case for case in CASES if case not in V_CASES]  # models trained with flow matching


@cache
def loaded(name: str) -> SaoModel:
    """Returns the tiny checkpoint `name`, loaded on the CPU."""
    model = load_model(resolve_entry(name, path=str(load_open_goldens(name).folder)))
    assert isinstance(model, SaoModel)
    return model


def with_objective(folder: Path, objective: str, *, target: Path) -> Path:
    """Copy a checkpoint to `target` and change the diffusion objective in its config. Returns `target`."""
    shutil.copytree(folder, target)
    values = json.loads((target / "model_config.json").read_text())
    values["model"]["diffusion"]["diffusion_objective"] = objective
    (target / "model_config.json").write_text(json.dumps(values))
    return target


def with_sample_size(folder: Path, sample_size: int, *, target: Path) -> Path:
    """Copy a checkpoint to `target` and change the `sample_size` in its config. Returns `target`."""
    shutil.copytree(folder, target)
    values = json.loads((target / "model_config.json").read_text()) | {"sample_size": sample_size}
    (target / "model_config.json").write_text(json.dumps(values))
    return target


@pytest.fixture(scope="module")
def rectified_flow(tmp_path_factory: pytest.TempPathFactory) -> SaoModel:
    folder = load_open_goldens("tiny-small").folder
    target = with_objective(folder, "rectified_flow", target=tmp_path_factory.mktemp("flow") / "checkpoint")
    model = load_model(resolve_entry("flow", path=str(target)))
    assert isinstance(model, SaoModel)
    return model


def test_rk4_uses_even_times_if_the_config_has_no_shift(tmp_path: Path) -> None:
    folder = with_objective(load_open_goldens("tiny-small").folder, "rectified_flow", target=tmp_path / "checkpoint")
    values = json.loads((folder / "model_config.json").read_text())
    del values["model"]["diffusion"]["distribution_shift_options"]
    (folder / "model_config.json").write_text(json.dumps(values))
    model = load_model(resolve_entry("flow", path=str(folder)))
    (plan,) = model.plan(GenerationRequest(prompt="", duration_s=1.0, seed=0, steps=4, sampler="rk4"))
    assert [evaluation.t for evaluation in plan.sampler.evaluations[::4]] == [1.0, 0.75, 0.5, 0.25]


def sampler_of(name: str, arguments: dict[str, Any]) -> str:
    sampler: str = arguments.get("sampler_type", "dpmpp-2m-sde" if name == "tiny-1.0" else "euler")
    return sampler


def make_noise(name: str, arguments: dict[str, Any], shape: tuple[int, int, int]) -> ReplayNoise:
    """Returns a noise source that draws in the reference code's order: initial noise, source encoder, sampler."""
    steps, sampler, level = arguments["steps"], sampler_of(name, arguments), arguments.get("init_noise_level")
    script: list[ReplayDraw | ReplayPath] = [ReplayDraw("initial", 0, shape)]
    if level is not None:
        script.append(ReplayDraw("init/bottleneck", 0, (1, *shape[1:])))
    if sampler.endswith("-sde"):
        span = SigmaRange(arguments.get("sigma_min", 0.01), level or arguments.get("sigma_max", 100.0))
        script.append(ReplayPath(tuple(polyexponential_sigmas(steps, span).tolist()), shape))
    else:
        script += [ReplayDraw("step", step, shape) for step in range(steps)]
    return ReplayNoise(arguments["seed"], script, num_rows=shape[0])


def to_requests(name: str, facts: dict[str, Any]) -> list[GenerationRequest]:
    """Returns a request for each row of a stored case. The seed of a request is the number of its row."""
    arguments = facts["args"]
    negatives = arguments.get("negative_conditioning") or [{}]
    source = None
    if inputs := facts.get("inputs"):
        source = SourceAudio(load_open_goldens(name).tensors[inputs["init_audio"]].numpy(), inputs["init_rate"])
    is_v = name == "tiny-1.0"
    return [
        GenerationRequest(
            prompt=row["prompt"],
            duration_s=arguments["sample_size"] / 1000,
            seed=index,
            start_s=row.get("seconds_start", 0),
            conditioned_total_s=row["seconds_total"],
            negative_prompt=negatives[0].get("prompt"),
            negative_start_s=negatives[0].get("seconds_start"),
            negative_total_s=negatives[0].get("seconds_total"),
            steps=arguments["steps"],
            cfg_scale=arguments.get("cfg_scale", 6.0),
            sampler=arguments.get("sampler_type", "dpmpp-2m-sde" if is_v else "euler"),
            sigma_min=arguments.get("sigma_min", 0.01) if is_v else None,
            sigma_max=arguments.get("sigma_max", 100.0) if is_v else None,
            cfg_rescale=arguments.get("scale_phi", 0.0),
            init_audio=source,
            init_noise_level=arguments.get("init_noise_level", 1.0),
            edit_schedule=None if is_v else "reference",
        )
        for index, row in enumerate(arguments["conditioning"])
    ]


def run(
    model: DiffusionModel,
    requests: list[GenerationRequest],
    *,
    noise: ReplayNoise | None = None,
    frames: int | None = None,
    mode: Mode = "strict",
) -> list[npt.NDArray[np.float32]]:
    """Generate the requests concurrently and return their audio."""

    async def generate() -> list[npt.NDArray[np.float32]]:
        options = EngineOptions(mode=mode, warmup_budget_s=0.0, max_queue_s=1e9)
        engine = Engine(model, options) if noise is None else Engine(model, options, noise_factory=noise.row)
        await engine.start()
        try:
            results = await asyncio.gather(*(engine.generate(request, frames=frames) for request in requests))
        finally:
            await engine.close()
        return [audio for result in results for audio in result.audio]

    return asyncio.run(generate())


@pytest.mark.parametrize(("name", "case"), [*V_CASES, *starmap(slow, FLOW_CASES)])
def test_reference_run_is_reproduced(name: str, case: str, rectified_flow: SaoModel) -> None:
    goldens = load_open_goldens(name)
    facts, latents = goldens.facts["cases"][case], goldens.tensors[f"{case}/latents"]
    model = rectified_flow if case.startswith("gen/rf_") else loaded(name)
    noise = make_noise(name, facts["args"], tuple(latents.shape))
    made = run(model, to_requests(name, facts), noise=noise, frames=latents.shape[-1])
    stored = goldens.tensors.get(f"{case}/audio")
    expected: Tensor = model.autoencoder.decode(latents) if stored is None else stored
    torch.testing.assert_close(torch.from_numpy(np.stack(made)), expected.detach(), rtol=0, atol=TOLERANCE)
