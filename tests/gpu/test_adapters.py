"""On CUDA, requests with different adapters share steps, eager or captured, and give the same audio as alone."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch

from stable_audio_serve.core.generation import GenerationRequest, GenerationResult, Lora
from stable_audio_serve.engine import Engine, EngineOptions
from stable_audio_serve.models.adapters.base import Base
from tests.engine.test_checkpoint_independence import SUBJECTS
from tests.gpu.loaded import load_on, open_for
from tests.gpu.test_independence import ACROSS_DEVICES, FAST, in_engine, largest_difference
from tests.models.adapters.plain import TYPES, make_change, write_adapter

pytestmark = pytest.mark.gpu

ROUNDS = 4  # how often the requests are sent; only calls that repeat are captured


def make_requests(folder: Path) -> list[GenerationRequest]:
    """Returns the requests in `SUBJECTS` with different adapters. The first request has no adapter."""
    base = Base("sharp-s", load_on(torch.device("cpu"), "sharp-s", torch.float32).adaptable)
    layers = [layer for layer in base.layers if layer.startswith("model.")]
    loras = []
    for seed, kind in enumerate(TYPES):
        made = make_change(base, kind, alpha=0.1, seed=seed, layers=layers)
        for layer, parts in made.tensors.items():
            if "magnitude" in parts:
                parts["magnitude"] = base.weight(layer).norm(dim=1).half()
        config = {"rank": made.rank, "alpha": made.alpha, "adapter_type": kind}
        loras.append(Lora(kind, source=str(write_adapter(folder / f"{kind}.safetensors", made.tensors, config))))
    chains = [(), *((lora,) for lora in loras), tuple(loras[:2])]
    subjects = list(SUBJECTS.values())
    return [
        GenerationRequest(**{name: getattr(subject, name) for name in subject.__slots__} | {"loras": chain})
        for subject, chain in zip(subjects, chains[: len(subjects)] + chains, strict=False)
    ]


@pytest.mark.parametrize("dtype", FAST, ids=str)
@pytest.mark.parametrize("mode", ["strict", "fast"])
def test_adapters_of_other_rows_do_not_change_the_audio(
    device: torch.device, tmp_path: Path, dtype: torch.dtype, mode: str
) -> None:
    requests = make_requests(tmp_path)
    options = EngineOptions(mode=mode, warmup_budget_s=0.0)  # type: ignore[arg-type]

    async def alone(engine: Engine) -> list[GenerationResult]:
        return [await engine.generate(request) for request in requests]

    async def together(engine: Engine) -> list[GenerationResult]:
        return [await asyncio.gather(*map(engine.generate, requests)) for _ in range(ROUNDS)][-1]

    model = load_on(device, "sharp-s", dtype)
    found = in_engine(Engine(model, options, device=open_for(device)), together)
    expected = in_engine(Engine(model, options, device=open_for(device)), alone)
    assert largest_difference(found, expected) <= (0.0 if mode == "strict" else FAST[dtype])
    if dtype == torch.float32 and device.type == "cpu":
        plain = in_engine(Engine(load_on(torch.device("cpu"), "sharp-s", dtype), options), alone)
        assert largest_difference(found, plain) <= ACROSS_DEVICES
