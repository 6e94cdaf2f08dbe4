"""Stable Audio Open: a request gives the same audio alone and with requests with other samplers and options."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from stable_audio_serve.core.catalog import FLOW_SAMPLERS, V_SAMPLERS
from stable_audio_serve.core.generation import GenerationRequest
from stable_audio_serve.engine import Engine, EngineOptions
from stable_audio_serve.models.families import load_model
from stable_audio_serve.models.protocol import DiffusionModel
from stable_audio_serve.models.registry import resolve_entry
from tests.factories import make_audio
from tests.goldens import load_open_goldens
from tests.models.sao.tiny import TINY
from tests.parameters import slow
from tests.patience import PATIENCE_S

CLIP = make_audio(9.0, sample_rate_hz=1000)
FAST_TOLERANCE = 2e-4  # for fast mode; the largest difference observed is 4.2e-5
SAMPLERS = {"tiny-1.0": V_SAMPLERS, "tiny-small": FLOW_SAMPLERS}


def make_requests(name: str) -> list[GenerationRequest]:
    """Returns two requests for each sampler, with various guidance, negative prompts, sources, edits and steps."""
    level = 2.0 if name == "tiny-1.0" else 0.7
    variants: list[dict[str, object]] = [
        {"cfg_scale": 1.0},
        {"cfg_scale": 6.0, "cfg_rescale": 0.4},
        {"cfg_scale": 4.0, "negative_prompt": "noise", "negative_total_s": 3.0},
        {"cfg_scale": 5.0, "cfg_interval": (0.2, 0.9), "conditioned_total_s": 12.0},
        {"cfg_scale": 2.0, "inpaint_audio": CLIP, "inpaint_regions_s": ((2.0, 4.0),)},
        {"cfg_scale": 3.0, "init_audio": CLIP},
    ]
    requests = []
    for index, sampler in enumerate((*SAMPLERS[name], *SAMPLERS[name])):
        fields = variants[(index + index // len(SAMPLERS[name])) % len(variants)]
        if "init_audio" in fields:
            fields = fields | {"init_noise_level": 0.5 if sampler.startswith("v-ddim") else level}
        own = {
            "prompt": f"sound {index % 5}",
            "duration_s": 1.0 + index % 4,
            "seed": 40 + index,
            "steps": 3 + index % 4,
        }
        requests.append(GenerationRequest(sampler=sampler, **own, **fields))  # type: ignore[arg-type]
    return requests


@cache
def load(name: str) -> DiffusionModel:
    return load_model(resolve_entry(name, path=str(load_open_goldens(name).folder)))


def make_engine(name: str, mode: str) -> Engine:
    fields = {"max_queue_s": 1e6} | {
        "strict": {"mode": "strict"},
        "fast": {"mode": "fast", "frame_grid": 64, "fixed_share": 0.001},
        "packed": {"mode": "fast", "fixed_share": 0.001},
    }[mode]
    return Engine(load(name), EngineOptions(torch_threads=1, warmup_budget_s=0.0, **fields))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        ("strict", "tiny-small"),
        *(slow(mode, name) for mode in ("strict", "fast") for name in TINY if (mode, name) != ("strict", "tiny-small")),
        slow("packed", "tiny-small"),
    ],
)
@pytest.mark.server
async def test_rows_of_other_samplers_do_not_change_the_audio(name: str, mode: str) -> None:
    requests = make_requests(name)
    num_early = len(requests) // 2
    alone = []
    for request in requests:
        async with make_engine(name, mode) as engine:
            alone.append((await engine.generate(request)).audio[0])
    async with make_engine(name, mode) as engine:
        moving = asyncio.Event()
        leaving = replace(requests[0], prompt="gone", duration_s=4.0, steps=30)
        cancelled = asyncio.create_task(engine.generate(leaving, lambda p: moving.set() if p.steps_done else None))
        early = [asyncio.create_task(engine.generate(request)) for request in requests[:num_early]]
        await asyncio.wait_for(moving.wait(), PATIENCE_S)
        late = [asyncio.create_task(engine.generate(request)) for request in requests[num_early:]]
        await asyncio.sleep(0)
        cancelled.cancel()
        crowd = await asyncio.gather(*early, *late)
    differences = [float(np.abs(made.audio[0] - own).max()) for made, own in zip(crowd, alone, strict=True)]
    assert all(np.abs(audio).max() > 0.01 for audio in alone)
    assert max(differences) <= (0.0 if mode == "strict" else FAST_TOLERANCE), differences
