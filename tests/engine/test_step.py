"""A sampling step as a CUDA graph: a replay for other rows gives the same values as a step run for those rows."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from itertools import product, starmap
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stable_audio_serve.engine import Engine, EngineOptions
from stable_audio_serve.models.protocol import RowConditioning, RowPlan, StepBatch
from tests.engine.capturing import GraphCounts, RecordingDevice
from tests.engine.late_device import record
from tests.engine.step_bench import DEVICE, NETWORK_ROWS, REQUESTS, Bench, tensors_of
from tests.factories import ToyModel, make_request, make_varied_requests
from tests.models.loaded import loaded
from tests.parameters import slow

KINDS = (("plain", "plain"), ("guided", "other guidance"), ("many registers", "plain"))
SHORT = [("toy", kinds) for kinds in KINDS]
LONG = [one for one in product(("sharp-s", "sharp-l"), KINDS) if one not in SHORT]


@pytest.mark.parametrize(("name", "kinds"), [*SHORT, *starmap(slow, LONG)])
@pytest.mark.server
def test_replayed_step_is_bit_identical_for_other_rows(name: str, kinds: tuple[str, str]) -> None:
    bench = Bench(ToyModel() if name == "toy" else loaded(name))
    with torch.inference_mode():
        first, second = (bench.rows(REQUESTS[kind], evaluation=evaluation) for evaluation, kind in enumerate(kinds))
        draws = bench.shape(first).draws or bench.shape(second).draws
        general = replace(bench.shape(first), draws=draws).general()
        addresses = [memory.data_ptr() for memory in tensors_of(bench.memories)]
        before, buffer = bench.registers.memory.clone(), general.write(first, DEVICE)
        replay = record(lambda: bench.step(general, buffer))
        bench.registers.memory.copy_(before)

        bench.step(bench.shape(second), bench.shape(second).write(second, DEVICE))
        expected = bench.results(second)
        untouched = bench.results(first)
        bench.registers.memory.copy_(before)
        buffer.copy_(general.write(second, DEVICE))
        replay()
        assert bench.results(second) == expected
        assert bench.results(first) == untouched
        assert [memory.data_ptr() for memory in tensors_of(bench.memories)] == addresses


class AdaptedModel(ToyModel):
    """A toy model with adapters: low-rank matrices (LoRA) whose output is added to the prediction.

    A prompt that begins with "as " names an adapter. The conditioning of such a request has the adapter's matrices,
    which have the same shape for all adapters. The conditioning of other requests has no matrices.
    """

    RANK = 3

    def terms(self, adapter: str) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(sum(adapter.encode()))
        shape = (2, self.RANK, self.spec.card.latent_channels)
        into, out = torch.randn(shape, generator=generator)
        return {"adapter.into": into, "adapter.out": out}

    def condition(self, plan: RowPlan, **given: Any) -> RowConditioning:
        own = super().condition(plan, **given)
        if plan.prompt.startswith("as "):
            constants = {**own.conditional.constants, **self.terms(plan.prompt)}
            own = replace(own, conditional=replace(own.conditional, constants=constants))
        return own

    def denoise(self, batch: StepBatch) -> Tensor:
        output = super().denoise(batch)
        if "adapter.into" not in batch.constants:
            return output
        into, out = batch.constants["adapter.into"], batch.constants["adapter.out"]
        return output + out.transpose(1, 2) @ (into @ batch.x)


def test_another_adapter_needs_no_new_capture() -> None:
    """The graph reads an adapter's matrices from a memory slot, so a replay uses what the slot has at that time."""
    bench = Bench(AdaptedModel())
    first = (make_request("as a choir", duration_s=0.6, seed=1), make_request(duration_s=0.4, seed=2))
    second = (make_request(duration_s=0.5, seed=3), make_request("as a band", duration_s=0.8, seed=4, cfg_scale=3.0))
    with torch.inference_mode():
        rows, others = (bench.rows(requests, evaluation=0) for requests in (first, second))
        general = replace(bench.shape([*rows, *others]).general(), rows=NETWORK_ROWS)
        buffer = general.write(rows, DEVICE)
        replay = record(lambda: bench.step(general, buffer))
        slot = others[1].branches[0].slots["adapter.out"]
        outcomes = []
        for name in ("as a band", "as a bell"):
            for term, value in AdaptedModel().terms(name).items():
                bench.conditioning.slots[term].memory[slot] = value
            before = bench.registers.memory.clone()
            bench.step(bench.shape(others), bench.shape(others).write(others, DEVICE))
            expected = bench.results(others)
            bench.registers.memory.copy_(before)
            buffer.copy_(general.write(others, DEVICE))
            replay()
            assert bench.results(others) == expected
            bench.registers.memory.copy_(before)
            outcomes.append(expected)
        assert outcomes[0][0] == outcomes[1][0]  # the row without an adapter does not change
        assert outcomes[0][1] != outcomes[1][1]


def test_steps_without_adapters_have_no_adapter_inputs() -> None:
    bench = Bench(AdaptedModel())
    rows = bench.rows((make_request(duration_s=0.5, seed=3),), evaluation=0)
    assert bench.shape(rows).constants == ("context",)


async def test_replayed_steps_give_the_same_audio_and_count_misses() -> None:
    options = EngineOptions(mode="strict", warmup_budget_s=0.0, torch_threads=1)
    requests = make_varied_requests()
    async with Engine(ToyModel(), options) as engine:
        expected = [await engine.generate(request) for request in requests]
    device, metrics = RecordingDevice(), GraphCounts()
    async with Engine(ToyModel(), options, device=device, metrics=metrics) as engine:
        await asyncio.gather(*map(engine.generate, requests))
        num_graphs = -1
        # Wait until the idle engine has captured all shapes, one after another.
        while num_graphs != metrics.graphs.total():
            num_graphs = metrics.graphs.total()
            await asyncio.sleep(0.3)
        before = device.num_replays, metrics.misses.total()
        results = await asyncio.gather(*map(engine.generate, requests))
    assert device.num_replays > before[0]
    assert metrics.misses.total() - before[1] < device.num_replays - before[0]
    for result, alone in zip(results, expected, strict=True):
        for left, right in zip(result.audio, alone.audio, strict=True):
            np.testing.assert_array_equal(left, right)
