"""The counters against operations counted by hand, and what they say of the engine as it is: upper bounds, to be
lowered whenever a change needs less.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from benchmarks.counting.host_work import Setting, count, run_apart
from benchmarks.counting.launches import META, build_denoiser, count_denoiser_call, count_model, counting
from benchmarks.counting.stand_in_device import DEVICE, StandInDevice, StandInTensor
from stable_audio_serve.engine.stages import Stages

pytestmark = pytest.mark.slow


def _mixture() -> None:
    here = torch.ones(4).to(DEVICE)  # a copy
    doubled = here * 2  # a launch
    total = doubled[1:3].view(2, 1).sum()  # two views and a launch
    assert total.item() == 4.0  # a wait
    assert (here + torch.ones(4)).device == DEVICE  # a mix-up, and a launch where it would work
    assert doubled.cpu().tolist() == [2.0] * 4  # a copy


def _here(*shape: int) -> torch.Tensor:
    return torch.ones(shape, device=DEVICE)  # a launch


def _masked_write() -> None:
    x = _here(4)
    x[x > 2] = 1.0  # a comparison and a fill


def _pinned() -> None:
    x = torch.empty(4, device=DEVICE)
    buffer = torch.zeros(8).pin_memory()
    x.copy_(buffer[:4], non_blocking=True)
    buffer[4:].copy_(x, non_blocking=True)
    x.copy_(buffer[:4])  # waits, because it was not told otherwise


def _attend_under(mask: torch.Tensor) -> None:
    F.scaled_dot_product_attention(*[_here(1, 1, 4, 8)] * 3, attn_mask=mask)


def _in_place() -> None:
    x = _here(2, 3)
    x[0] += 1.0  # one addition; writing back what is there already starts nothing
    assert x.cpu().tolist() == [[2.0] * 3, [1.0] * 3]


# By hand: copies to the device, to the host, asynchronous ones, waits, mix-ups, launches.
BY_HAND: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "a mixture": (_mixture, (1, 1, 0, 1, 1, 3)),
    "nothing on the device": (lambda: torch.ones(3)[torch.tensor([0])] @ torch.ones(1), (0, 0, 0, 0, 0, 0)),
    "a tensor from values": (lambda: torch.tensor([1.0, 2.0], device=DEVICE), (1, 0, 0, 0, 0, 0)),
    "memory without contents": (lambda: torch.empty(3, device=DEVICE).view(3, 1), (0, 0, 0, 0, 0, 0)),
    "another precision": (lambda: _here(3).half().half(), (0, 0, 0, 0, 0, 2)),
    "a list as index": (lambda: _here(3)[[0, 2]], (1, 0, 0, 0, 0, 2)),
    "an index on the device": (lambda: _here(3)[torch.arange(2, device=DEVICE)], (0, 0, 0, 0, 0, 3)),
    "a mask as index": (lambda: _here(3)[_here(3) > 0], (0, 0, 0, 1, 0, 4)),
    "one value where a mask is true": (_masked_write, (0, 0, 0, 0, 0, 3)),
    "a truth value": (lambda: bool(_here(1) > 0), (0, 0, 0, 1, 0, 2)),
    "nonzero": (lambda: _here(3).nonzero(), (0, 0, 0, 1, 0, 2)),
    "unpinned memory": (lambda: torch.ones(3).to(DEVICE, non_blocking=True), (1, 0, 0, 0, 0, 0)),
    "pinned memory": (_pinned, (1, 0, 2, 0, 0, 0)),
    "in place": (_in_place, (0, 1, 0, 0, 0, 2)),
    "a linear layer": (lambda: F.linear(_here(2, 5, 4), _here(3, 4), _here(3)), (0, 0, 0, 0, 0, 4)),
    "a norm": (lambda: F.rms_norm(_here(2, 4), (4,), _here(4)), (0, 0, 0, 0, 0, 3)),
    "a norm of a slice, copied first": (lambda: F.rms_norm(_here(2, 8)[:, :4], (4,)), (0, 0, 0, 0, 0, 3)),
    "a norm with a gain of another dtype": (
        lambda: F.rms_norm(_here(2, 4).half(), (4,), _here(4)),
        (0, 0, 0, 0, 0, 11),
    ),
    "attention": (lambda: F.scaled_dot_product_attention(*[_here(1, 1, 4, 8)] * 3), (0, 0, 0, 0, 0, 2)),
    "attention under a mask": (lambda: _attend_under(_here(1, 1, 4, 16)[..., :4]), (0, 0, 0, 0, 0, 3)),
    "attention under truth values": (lambda: _attend_under(_here(1, 1, 4, 16)[..., :4] > 0), (0, 0, 0, 0, 0, 7)),
    "tensors joined": (lambda: torch.cat([_here(2, 2, 2, 3).transpose(2, 3)] * 2), (0, 0, 0, 0, 0, 2)),
    "tensors of five dimensions joined": (
        lambda: torch.cat([_here(1, 2, 2, 2, 3).transpose(3, 4)] * 2),
        (0, 0, 0, 0, 0, 3),
    ),
    "a random draw": (
        lambda: torch.randn(3, generator=torch.Generator(device=DEVICE).manual_seed(1), device=DEVICE),
        (0, 0, 0, 0, 0, 1),
    ),
}
# Waits and launches of the worst call, by kind of request. No call has a blocking copy either way. Plain requests
# are of the sampler pingpong; the case `micro` also counts rk4, whose steps are four calls each.
DENOISE = {
    "plain": 197,
    "guided": 245,
    "variation": 197,
    "inpaint": 198,
    "mixed": 265,
    "sampler euler": 195,
    "sampler dpmpp": 203,
}
OTHERS = {"text": (0, 159), "begin": (0, 77), "encode": (0, 192), "finish": (0, 7), "decode": (0, 251)}
OPEN = {"guided": 136, "inpaint": 153}  # of Stable Audio Open
STRICT = {**OTHERS, "text": (0, 302), "denoise": (0, 262), "decode": (0, 1230)}


def _count_by_hand(name: str) -> tuple[tuple[int, ...], list[str]]:
    device = StandInDevice()
    with torch.inference_mode(), device, device.section(name) as work:
        BY_HAND[name][0]()
    copies = work.copies_to_device, work.copies_to_host, work.asynchronous_copies
    return (*copies, work.waits, work.mix_ups, work.launches), sorted(work.origins)


def _what_is_patched(_: object) -> list[bool]:
    """Returns whether each of the things that counting replaces is as it was."""
    replaced = Stages.start, Stages.denoise, Stages._take_latents
    are_methods = [method.__qualname__.startswith("Stages") for method in replaced]
    are_unwrapped = [not hasattr(method, "__wrapped__") for method in replaced]
    modes = torch._C._len_torch_dispatch_stack() + torch._C._len_torch_function_stack()
    return [*are_methods, *are_unwrapped, modes == 0, torch.Generator.__module__ == "torch._C"]


def _use_outside(_: object) -> str:
    try:
        StandInTensor(torch.ones(2)) + 1
    except RuntimeError as error:
        return str(error)
    return "it worked"


def name_of(setting: Setting) -> str:
    return " ".join((setting.family, setting.kind, setting.mode, setting.dtype))


def _run(call: tuple[Callable[[Any], Any], Any]) -> Any:
    function, argument = call
    return function(argument)


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    """What a process of its own makes of everything, in this order."""
    settings = [Setting(kind) for kind in DENOISE]
    settings += [Setting("mixed", "strict"), Setting("plain", "fast", "float32")]
    settings += [Setting(kind, "fast", "float32", "open") for kind in OPEN]
    calls: dict[str, tuple[Callable[[Any], Any], Any]] = {
        **{name: (_count_by_hand, name) for name in BY_HAND},
        **{name_of(setting): (count, setting) for setting in settings},
        "patched": (_what_is_patched, None),
        "outside": (_use_outside, None),
    }
    return dict(zip(calls, run_apart(_run, calls.values()), strict=True))


@pytest.mark.parametrize("name", BY_HAND)
def test_what_crosses_and_waits_is_counted_as_by_hand(name: str, results: dict[str, Any]) -> None:
    assert results[name][0] == BY_HAND[name][1]


def test_the_lines_that_cross_and_wait_are_told(results: dict[str, Any]) -> None:
    assert [origin.rsplit(":")[0] for origin in results["a mixture"][1]] == [
        "copy to device benchmarks/test_counting.py",
        "copy to host benchmarks/test_counting.py",
        "mix-up add benchmarks/test_counting.py",
        "wait _local_scalar_dense benchmarks/test_counting.py",
    ]


def test_nothing_stays_behind(results: dict[str, Any]) -> None:
    assert all(results["patched"])


def test_a_stand_in_tensor_is_of_no_use_outside(results: dict[str, Any]) -> None:
    assert "outside its context" in results["outside"]


def test_no_operation_mixes_devices(results: dict[str, Any]) -> None:
    counted = {name: figures for name, figures in results.items() if name.startswith(("sa3 ", "open "))}
    mixed = {
        (name, call): work["origins"]
        for name, figures in counted.items()
        for call, work in figures.items()
        if work["mix_ups"]
    }
    assert len(counted) == len(DENOISE) + 2 + len(OPEN)
    assert mixed == {}


@pytest.mark.parametrize("kind", DENOISE)
def test_a_step_waits_for_nothing_and_makes_one_copy(kind: str, results: dict[str, Any]) -> None:
    assert_one_copy(results[f"sa3 {kind} fast float16"]["denoise"], DENOISE[kind])


def test_full_precision_needs_no_more(results: dict[str, Any]) -> None:
    assert_one_copy(results["sa3 plain fast float32"]["denoise"], 154)


@pytest.mark.parametrize("kind", OPEN)
def test_a_step_of_stable_audio_open_waits_for_nothing(kind: str, results: dict[str, Any]) -> None:
    assert_one_copy(results[f"open {kind} fast float32"]["denoise"], OPEN[kind])


@pytest.mark.parametrize("call", OTHERS)
def test_other_calls_wait_no_more_than_today(call: str, results: dict[str, Any]) -> None:
    assert_within(results["sa3 mixed fast float16"][call], OTHERS[call])


@pytest.mark.parametrize("call", STRICT)
def test_strict_calls_wait_no_more_than_today(call: str, results: dict[str, Any]) -> None:
    assert_within(results["sa3 mixed strict float16"][call], STRICT[call])


def assert_one_copy(work: dict[str, Any], most_launches: int) -> None:
    assert_within(work, (0, most_launches))
    assert work["asynchronous_copies"] == 1


def assert_within(work: dict[str, Any], most: tuple[int, int]) -> None:
    assert work["calls"] > 0
    found = work["waits"], work["launches"]
    assert all(value <= bound for value, bound in zip(found, most, strict=True)), (found, most, work["origins"])
    assert work["blocking_copies"] == 0


def test_launches_arithmetic_and_memory_are_counted_as_by_hand() -> None:
    weight = torch.empty(16, 4, device=META)
    with counting() as work:
        x = torch.zeros(8, 16, device=META)  # 512 bytes
        y = x @ weight  # 128 bytes
        del x
        total = (y.t() + 1.0).sum()  # 128 bytes beside y, then 4 more
        torch.ones(100) * 2.0  # elsewhere
    assert total.shape == ()
    assert dict(work.launches) == {"zeros": 1, "mm": 1, "t": 0, "add": 1, "sum": 1}
    assert work.num_launches == 4
    assert work.flops == 2 * 8 * 16 * 4
    assert work.peak_bytes == 512 + 128


def test_the_arithmetic_of_a_call_is_that_of_the_formula() -> None:
    config, denoiser = build_denoiser("small-music")
    frames, context, width, depth = 384, 257, 1024, 20
    tokens = frames + 64
    # Self-attention's four products, cross-attention's two, and a gated layer of four times the width.
    layer = 2 * tokens * width * width * (4 + 2 + 12) + 4 * tokens * (tokens + context) * width
    counted = count_denoiser_call(denoiser, config, rows=1, frames=frames)
    assert counted["tflop"] * 1e12 == pytest.approx(depth * layer, rel=0.01)


@pytest.mark.parametrize(("name", "layer", "call", "window"), [("small-music", 25, 549, 132), ("medium", 28, 721, 365)])
def test_official_shapes_start_no_more_kernels_than_today(name: str, layer: int, call: int, window: int) -> None:
    figures = count_model(name, calls=[(8, 64)], windows=[(8, 64)])
    assert figures["launches_per_layer"] <= layer, figures["calls"][0]["launches_per_layer_by_operation"]
    assert figures["launches_per_call"] <= call
    assert figures["launches_per_decoder_window"] <= window
    assert figures["graph_breaks_per_layer"] == 0
