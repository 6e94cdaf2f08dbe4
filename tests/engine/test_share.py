"""The limit on a process's share of a GPU's memory: its arithmetic, and an engine on a simulated device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from stable_audio_serve.core.clock import SystemClock
from stable_audio_serve.core.errors import ConfigError, InvalidRequestError
from stable_audio_serve.engine import Engine, EngineOptions
from stable_audio_serve.engine.hardware.device import free_and_total, open_device
from stable_audio_serve.engine.hardware.graphs import Graphs
from stable_audio_serve.engine.hardware.share import (
    CONTEXT_BYTES,
    DeviceMemory,
    allowed_bytes,
    least_share,
    plan_memory,
    require_share,
)
from tests.engine.capturing import GraphCounts, RecordingDevice
from tests.engine.test_graphs import AnyShape
from tests.engine.test_memory import CallSizes, bytes_of
from tests.factories import FakeClock, ToyModel, make_request

GB = 10**9
CARD = 80 * GB


class SharedDevice(RecordingDevice):
    """A CPU device with simulated GPU memory, of which this process may use `share` and has allocated `held` bytes."""

    def __init__(self, total: int, *, share: float = 1.0, held: int = 0, free: int | None = None) -> None:
        super().__init__()
        self.default_mode = "fast"
        self.total, self.share, self.held, self.free = total, share, held, free
        self.capture_bytes = 0

    def memory(self) -> DeviceMemory:
        free = self.total - self.held if self.free is None else self.free
        return DeviceMemory(self.total, allowed_bytes(self.total, share=self.share), self.held, free)

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        self.held += self.capture_bytes
        return super().capture(run)


def test_four_quarter_shares_with_contexts_fill_one_gpu() -> None:
    quarter = allowed_bytes(CARD, share=0.25)
    assert quarter == 20 * GB - CONTEXT_BYTES
    assert 4 * (quarter + CONTEXT_BYTES) == CARD
    assert allowed_bytes(CARD, share=1.0) == CARD
    assert allowed_bytes(CONTEXT_BYTES, share=0.5) == 0


def test_remaining_memory_is_bounded_by_share_and_gpu() -> None:
    assert DeviceMemory(80, allowed=20, held=5, free=60).left == 15
    # Only 3 are free, because other processes use too much.
    assert DeviceMemory(80, allowed=20, held=5, free=3).left == 3
    assert DeviceMemory(80, allowed=20, held=25, free=60).left == 0


def test_the_parts_of_a_plan_add_up_to_the_share() -> None:
    memory = DeviceMemory(CARD, allowed=20 * GB, held=4 * GB, free=70 * GB)
    plan = plan_memory(memory, max_rows_bytes=None, prompt_cache_bytes=GB // 2, lora_cache_bytes=GB // 2)
    assert (plan.weights, plan.prompts, plan.adapters) == (4 * GB, GB // 2, GB // 2)
    assert (plan.reserve, plan.setting) == (1 * GB, "memory_share")
    assert (plan.rows, plan.graphs) == (int(0.85 * 14 * GB), int(0.15 * 14 * GB))
    assert str(replace(plan, context=2 * GB, decode=1 * GB)) == (
        "weights_gb=4.00 prompts_gb=0.50 adapters_gb=0.50 context_gb=2.00 rows_gb=8.90 decode_gb=1.00 "
        "graphs_gb=2.10 reserve_gb=1.00"
    )
    without = plan_memory(memory, max_rows_bytes=None, prompt_cache_bytes=1 * GB, captures=False)
    assert (without.rows, without.graphs) == (14 * GB, 0)


def test_the_operators_bound_applies_if_it_fits() -> None:
    memory = DeviceMemory(CARD, allowed=20 * GB, held=4 * GB, free=70 * GB)
    plan = plan_memory(memory, max_rows_bytes=15 * GB, prompt_cache_bytes=1 * GB)
    assert (plan.rows, plan.graphs, plan.setting) == (15 * GB, 0, "max_memory_bytes")
    with pytest.raises(
        ConfigError, match=r"max_memory_bytes is 15 GB, but .* may take 20 GB, its weights 4 GB"
    ) as caught:
        plan_memory(memory, max_rows_bytes=15 * GB + 1, prompt_cache_bytes=1 * GB)
    assert caught.value.allowed == f"1..{15 * GB}"


def test_a_cpu_has_only_the_operators_bound() -> None:
    device = open_device(torch.device("cpu"), clock=SystemClock(), share=0.25)
    assert device.memory() is None
    assert plan_memory(None, max_rows_bytes=None, prompt_cache_bytes=5).rows is None
    assert plan_memory(None, max_rows_bytes=123, prompt_cache_bytes=5).rows == 123


def test_a_too_small_share_is_refused_with_the_least_one() -> None:
    memory = DeviceMemory(10 * GB, allowed=allowed_bytes(10 * GB, share=0.25), held=0, free=10 * GB)
    require_share(memory, name="sfx", weights_bytes=memory.allowed, share=0.25)
    with pytest.raises(ConfigError) as refusal:
        require_share(memory, name="sfx", weights_bytes=3 * GB, share=0.25)
    assert refusal.value.field == "memory_share"
    assert "models.sfx: memory_share 0.25 of the GPU's 10 GB" in refusal.value.message
    assert "weights take 3 GB" in refusal.value.message
    assert "at least 0.36" in refusal.value.message
    assert allowed_bytes(10 * GB, share=0.36) >= 3 * GB > allowed_bytes(10 * GB, share=0.35)


def test_weights_larger_than_the_gpu_need_a_larger_gpu() -> None:
    memory = DeviceMemory(10 * GB, allowed=10 * GB, held=0, free=10 * GB)
    with pytest.raises(ConfigError, match="a larger GPU"):
        require_share(memory, name="sfx", weights_bytes=11 * GB, share=1.0)
    assert least_share(10 * GB, weights_bytes=10 * GB) == 1.0


def test_memory_that_other_programs_use_is_named() -> None:
    memory = DeviceMemory(10 * GB, allowed=10 * GB, held=1 * GB, free=2 * GB)
    require_share(memory, name="sfx", weights_bytes=3 * GB, share=1.0)  # in place of what this process holds
    with pytest.raises(ConfigError, match=r"weights take 4 GB, but only 3 GB of the GPU's 10 GB are free; stop other"):
        require_share(memory, name="sfx", weights_bytes=4 * GB, share=1.0)


def make_engine(device: SharedDevice, on_call: Callable[..., None] = lambda name, items: None) -> Engine:
    options = EngineOptions(mode="fast", warmup_budget_s=0.0, torch_threads=1, prompt_cache_bytes=0)
    return Engine(ToyModel(on_call=on_call), options, device=device)


def device_for(rows_bytes: int, *, share: float) -> SharedDevice:
    """Returns a device so large that an engine with this share of its memory has `rows_bytes` for running rows."""
    total = int((rows_bytes / 0.85 / 0.95 + CONTEXT_BYTES) / share) + 2
    return SharedDevice(total, share=share)


async def test_an_engine_runs_the_rows_that_fit_its_share() -> None:
    """The whole GPU would have memory for eight rows. The engine's share, a quarter, has memory for two."""
    request = make_request(duration_s=1.5, batch_size=16)  # one request, because its clips arrive at the same time
    device = device_for(int(2.5 * bytes_of(request)), share=0.25)
    assert device.total > 8 * bytes_of(request)
    sizes = CallSizes()
    async with make_engine(device, sizes) as engine:
        waited = await engine.generate(request)
    assert sizes.most == 2
    async with make_engine(SharedDevice(CARD), sizes) as engine:
        free = await engine.generate(request)
    assert sizes.most >= 4
    for own, other in zip(waited.audio, free.audio, strict=True):
        np.testing.assert_allclose(own, other, atol=1e-5)


async def test_a_clip_that_never_fits_the_share_names_the_setting() -> None:
    async with make_engine(device_for(int(1.1 * bytes_of(make_request(duration_s=1.0))), share=0.5)) as engine:
        with pytest.raises(InvalidRequestError, match="memory_share leaves") as refusal:
            await engine.generate(make_request(duration_s=2.0))
        assert refusal.value.field == "duration"
        await engine.generate(make_request(duration_s=1.0))


async def test_start_fails_if_the_share_holds_no_request() -> None:
    engine = make_engine(device_for(1000, share=0.5))
    with pytest.raises(ConfigError, match=r"memory_share leaves 1e-06 GB .* takes .* GB"):
        await engine.start()
    await engine.close()


def capture(sizes: Sequence[int], *, max_bytes: int, graph_bytes: int) -> tuple[SharedDevice, GraphCounts]:
    """Capture calls of these sizes. A call is expected to take 10 bytes per frame. Its graph takes `graph_bytes`."""
    device, metrics = SharedDevice(CARD, share=0.25), GraphCounts()
    device.capture_bytes = graph_bytes
    graphs = Graphs(device, clock=FakeClock(), metrics=metrics, max_bytes=max_bytes)
    graphs.room.expect("denoise", call_bytes=10.0)
    for size in sizes:
        for _ in range(2):
            assert graphs.find(AnyShape(size), lambda shape, memory: None) is None
    while graphs.capture_next(is_idle=True):
        pass
    return device, metrics


def test_captures_stop_when_their_part_of_the_share_is_used() -> None:
    device, metrics = capture([1, 2, 3, 4, 5], max_bytes=250, graph_bytes=100)
    assert metrics.graphs == {"denoise": 3}  # each capture takes 100 bytes, and no other begins after the third
    assert device.held == 300


def test_a_call_too_large_to_capture_leaves_room_for_others() -> None:
    _, metrics = capture([10, 20, 1000], max_bytes=250, graph_bytes=1)
    assert metrics.graphs == {"denoise": 2}  # the largest would take 10,000 bytes


def test_the_cuda_allocator_is_limited_to_the_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the calls to torch's functions are checked, because the machine may have no GPU."""
    fences: list[tuple[float, torch.device]] = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60 * GB, CARD))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 5 * GB)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *asked: fences.append(asked))
    cuda = torch.device("cuda:0")
    memory = open_device(cuda, clock=SystemClock(), share=0.25).memory()
    allowed = 20 * GB - CONTEXT_BYTES
    assert memory == DeviceMemory(CARD, allowed, held=5 * GB, free=60 * GB)
    assert fences == [(pytest.approx(allowed / CARD), cuda)]
    whole = open_device(cuda, clock=SystemClock()).memory()
    assert whole == DeviceMemory(CARD, CARD, held=5 * GB, free=60 * GB)
    assert len(fences) == 1


@pytest.mark.parametrize(("is_integrated", "free"), [(True, 64), (False, 2)])
def test_cached_files_take_no_memory_of_an_integrated_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_integrated: bool, free: int
) -> None:
    facts = tmp_path / "meminfo"
    facts.write_text(f"MemFree: {2 * GB // 1024} kB\nMemAvailable: {64 * GB // 1024} kB\nHugePages_Total: 0\n")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * GB, CARD))
    properties = SimpleNamespace(is_integrated=is_integrated)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert free_and_total(torch.device("cuda:0"), host_facts=facts) == (free * GB, CARD)
