"""What the engine assumes about asynchronous work on a device: reuse of memory, order of work, and CUDA graphs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from stable_audio_serve.engine.hardware.device import Device
from tests.gpu.loaded import gpu_only, open_for

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]
_NUMBERS, _TIMES = 20_000, 40
_BUSY_CYCLES = 200_000_000  # about 0.1 s, enough time for the host to run far ahead


@pytest.fixture
def opened(device: torch.device) -> Device:
    return open_for(device)


@pytest.fixture
def capturing(opened: Device) -> Device:
    if not opened.can_capture:
        pytest.skip("this device captures nothing")
    return opened


def keep_busy(opened: Device) -> None:
    if opened.torch_device.type == "cuda":
        torch.cuda._sleep(_BUSY_CYCLES)


def filled(opened: Device, value: float) -> Tensor:
    return opened.host_buffer(_NUMBERS, dtype=torch.float32).fill_(value)


def test_host_memory_is_not_reused_before_its_copy_is_done(opened: Device) -> None:
    there = torch.zeros(_TIMES, _NUMBERS, device=opened.torch_device)
    keep_busy(opened)
    uploaded = []
    for turn in range(_TIMES):  # each host buffer is freed at once, so the next one may get the same memory
        uploaded.append(opened.upload(filled(opened, turn)))
        there[turn].copy_(filled(opened, -turn), non_blocking=True)
        there[turn, 1:].copy_(filled(opened, turn)[1:], non_blocking=True)
    for turn, values in enumerate(uploaded):
        assert values.unique().tolist() == [turn]
        assert there[turn, 0] == -turn
        assert there[turn, 1:].unique().tolist() == [turn]


def test_unpinned_memory_is_copied_before_it_changes(opened: Device) -> None:
    keep_busy(opened)
    uploaded = []
    for turn in range(_TIMES):
        host = torch.full((_NUMBERS,), float(turn))
        uploaded.append(opened.upload(host[1:] if turn % 2 else host))
        if opened.torch_device.type == "cuda":  # on a CPU, the uploaded tensor may be the host tensor itself
            host.zero_()
    assert [values.unique().tolist() for values in uploaded] == [[turn] for turn in range(_TIMES)]


def test_downloads_are_complete_at_the_next_moment(opened: Device) -> None:
    target = torch.zeros(2, _NUMBERS)
    keep_busy(opened)
    source = torch.arange(_NUMBERS, dtype=torch.float32, device=opened.torch_device)
    for channel in target:
        opened.download(source[: _NUMBERS // 2], channel[: _NUMBERS // 2])
    moment = opened.mark()
    moment.wait()
    assert moment.is_reached()
    opened.collect()
    assert torch.equal(target[:, : _NUMBERS // 2], torch.arange(_NUMBERS // 2).float().expand(2, -1))
    assert not target[:, _NUMBERS // 2 :].any()


def test_downloads_larger_than_the_ring_are_complete(opened: Device) -> None:
    source = torch.arange(2**20, dtype=torch.float32, device=opened.torch_device)  # 4 MiB
    targets = torch.zeros(40, len(source))
    for turn, target in enumerate(targets):
        opened.download(source + turn, target)
    opened.mark().wait()
    opened.collect()
    for turn, target in enumerate(targets):
        assert torch.equal(target, torch.arange(2**20).float() + turn)


def test_the_queues_follow_each_other(opened: Device) -> None:
    device = opened.torch_device
    for turn in range(_TIMES):
        given = torch.zeros(_NUMBERS, device=device)
        keep_busy(opened) if turn % 10 == 0 else None
        given += turn
        with opened.on_second_queue(given):
            keep_busy(opened) if turn % 10 == 5 else None
            made = given * 2.0
            moment = opened.mark()
        del given  # its memory may be used again only after the second stream has read it
        others = [torch.full((_NUMBERS,), -1.0, device=device) for _ in range(4)]
        opened.follow(moment)
        assert (made + 1.0).unique().tolist() == [2.0 * turn + 1.0]
        assert all(bool((other == -1.0).all()) for other in others)


def test_moments_measure_device_time(opened: Device) -> None:
    began = opened.mark()
    keep_busy(opened)
    ended = opened.mark()
    ended.wait()
    assert ended.ms_since(began) >= (10.0 if opened.torch_device.type == "cuda" else 0.0)


def test_captured_work_follows_its_inputs_in_order(capturing: Device) -> None:
    inputs, state = (torch.zeros(_NUMBERS, device=capturing.torch_device) for _ in range(2))

    def run() -> None:
        state.mul_(0.5).add_(inputs.sin())

    replay = capturing.capture(run)
    again = capturing.capture(run)  # a second graph, which shares memory with the first
    state.zero_()
    expected = torch.zeros_like(state)
    keep_busy(capturing)
    for turn in range(_TIMES):
        inputs.copy_(filled(capturing, turn), non_blocking=True)
        (again if turn % 3 else replay)()
    for turn in range(_TIMES):
        expected.mul_(0.5).add_(torch.full_like(state, turn).sin())
    assert torch.equal(state, expected)


@gpu_only
def test_capturing_work_that_waits_for_the_device_is_refused(device: torch.device) -> None:
    """The capture runs in a separate process, because a failed capture may harm all later captures."""
    if device.type != "cuda":
        pytest.skip("this device captures nothing")
    command = [sys.executable, "-m", "tests.gpu.failing_capture", str(device)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_captures_work_after_all_earlier_ones_are_dropped(capturing: Device) -> None:
    values = torch.ones(8, device=capturing.torch_device)
    for _ in range(3):
        replay = capturing.capture(lambda: values.mul_(2.0))  # type: ignore[arg-type, return-value]
        replay()
        del replay
    assert values.tolist() == [64.0] * 8
