"""How the rows of a sampling step are split into calls of the network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stable_audio_serve.core.clock import SystemClock
from stable_audio_serve.core.generation import Mode
from stable_audio_serve.engine.build import resolve_policy
from stable_audio_serve.engine.hardware.device import open_device
from stable_audio_serve.engine.options import PLAIN, EngineOptions
from stable_audio_serve.engine.scheduling.batching import (
    GRAPH_ROWS,
    AnyRows,
    BatchPolicy,
    Call,
    EqualLengths,
    FixedSlots,
    GraphShapes,
    Lane,
    MergedGrid,
    OneRowPerCall,
    Packed,
)
from stable_audio_serve.engine.scheduling.cost import CostModel
from stable_audio_serve.models.protocol import ModelSpec
from tests.factories import ToyModel


def choose_policy(spec: ModelSpec, options: EngineOptions, *, device: str) -> BatchPolicy:
    opened = open_device(torch.device(device), clock=SystemClock())
    return resolve_policy(spec, options, device=opened, features=PLAIN, cost=CostModel())


def call_ms(rows: int, frames: int) -> float:
    return 3.0 + 0.01 * rows * frames


def knee_tokens(frames: int) -> float:
    return 1000.0


POLICIES: dict[str, Callable[[], BatchPolicy]] = {
    "one row": lambda: OneRowPerCall(),
    "slots": lambda: FixedSlots(slots=4, grid=64),
    "merged": lambda: MergedGrid(call_ms, knee_tokens, AnyRows()),
    "merged graphs": lambda: MergedGrid(call_ms, knee_tokens, GraphShapes()),
    "packed": lambda: Packed(knee_tokens),
    "equal lengths": lambda: EqualLengths(call_ms, knee_tokens, AnyRows()),
    "equal lengths of graphs": lambda: EqualLengths(call_ms, knee_tokens, GraphShapes()),
}
lanes = st.lists(
    st.builds(Lane, branches=st.sampled_from([1, 2]), frames=st.integers(1, 2000)), min_size=1, max_size=12
)


@pytest.mark.parametrize("policy", POLICIES)
@given(step=lanes)
def test_every_lane_fits_into_exactly_one_call(policy: str, step: list[Lane]) -> None:
    calls = POLICIES[policy]().split(step)
    assert sorted(i for call in calls for i in call.members) == list(range(len(step)))
    for call in calls:
        assert sum(step[i].branches for i in call.members) <= call.rows
        assert max(step[i].frames for i in call.members) <= call.frames


@given(step=lanes)
def test_strict_call_shapes_depend_only_on_the_lane(step: list[Lane]) -> None:
    for policy in (POLICIES["one row"](), POLICIES["slots"]()):
        for call in policy.split(step):
            for i in call.members:
                (alone,) = policy.split([step[i]])
                assert (alone.rows, alone.frames) == (call.rows, call.frames)


@pytest.mark.parametrize("make", [MergedGrid, EqualLengths])
@pytest.mark.parametrize("max_tokens", [1000, 6000, 16_384])
@given(step=lanes)
def test_calls_have_the_row_counts_of_graphs_and_stay_within_the_budget(
    make: type[MergedGrid | EqualLengths], max_tokens: int, step: list[Lane]
) -> None:
    shapes = GraphShapes(max_tokens=max_tokens)
    calls = make(call_ms, knee_tokens, shapes).split(step)
    assert sorted(i for call in calls for i in call.members) == list(range(len(step)))
    for call in calls:
        assert call.rows in GRAPH_ROWS
        assert call.rows >= sum(step[i].branches for i in call.members)
        assert call.rows * call.frames <= max_tokens or len(call.members) == 1
        assert call.frames >= max(step[i].frames for i in call.members)


@pytest.mark.parametrize(
    ("num_rows", "frames", "sizes"),
    [
        (5, 64, [6]),  # one call with a dummy row is faster than two calls
        (5, 1000, [4, 1]),
        (13, 64, [16]),
        (13, 640, [12, 1]),
        (40, 64, [32, 8]),
        (30, 1000, [16, 12, 2]),  # a call of more than 16 rows would exceed `max_tokens`
    ],
)
def test_rows_are_padded_or_split_whichever_is_faster(num_rows: int, frames: int, sizes: list[int]) -> None:
    calls = MergedGrid(call_ms, knee_tokens, GraphShapes()).split([Lane(1, frames)] * num_rows)
    assert sorted((call.rows for call in calls), reverse=True) == sizes


def test_graph_rows_are_padded_on_a_grid_that_coarsens() -> None:
    padded = MergedGrid(call_ms, knee_tokens, GraphShapes()).padded
    assert [padded(frames) for frames in (1, 500, 1000, 1025, 2049, 4092)] == [64, 512, 1024, 1152, 2304, 4096]


def test_a_call_on_a_cpu_has_any_number_of_rows() -> None:
    policy = choose_policy(ToyModel().spec, EngineOptions(mode="fast"), device="cpu")
    calls = policy.split([Lane(1, 77)] * 13)
    assert [(call.rows, call.frames) for call in calls] == [(13, 77)]


@pytest.mark.parametrize("policy", ["merged", "merged graphs"])
@given(step=lanes)
def test_merging_is_never_slower_than_not_merging(policy: str, step: list[Lane]) -> None:
    merged = POLICIES[policy]()
    ms = sum(call_ms(call.rows, call.frames) for call in merged.split(step))
    assert ms <= sum(call_ms(lane.branches, merged.padded(lane.frames)) for lane in step) + 1e-9


def test_similar_lengths_share_a_call_and_different_ones_do_not() -> None:
    calls = MergedGrid(call_ms, knee_tokens, GraphShapes()).split(
        [Lane(1, 100), Lane(1, 1900), Lane(1, 150), Lane(1, 2000)]
    )
    assert [(call.members, call.rows, call.frames) for call in calls] == [((0, 2), 2, 192), ((1, 3), 2, 2048)]


def test_packed_rows_share_one_call_sorted_by_length() -> None:
    (call,) = Packed(knee_tokens=lambda frames: 1000).split([Lane(1, 100), Lane(2, 430), Lane(1, 40), Lane(2, 100)])
    assert (call.members, call.rows, call.frames) == ((2, 0, 3, 1), 6, 430)
    assert call.lengths == (40, 100, 100, 100, 430, 430)
    assert call.groups == ((1, 40), (3, 100), (2, 430))


def test_unused_tokens_of_a_packed_call_are_shared_by_its_rows() -> None:
    call = Call((0, 1, 2), rows=4, frames=9, lengths=(9, 5, 5), tokens=24, num_spare=5)
    assert call.groups == ((1, 11), (2, 7))


def test_fast_mode_on_a_cpu_packs_rows_unless_a_grid_is_set() -> None:
    def choose(device: str, mode: Mode, grid: int | None = None) -> type[BatchPolicy]:
        options = EngineOptions(mode=mode, frame_grid=grid)
        return type(choose_policy(ToyModel(packs_rows=True).spec, options, device=device))

    assert choose("cpu", "fast") is Packed
    assert choose("cpu", "fast", 64) is choose("cuda", "fast") is MergedGrid
    assert choose("cpu", "strict") is OneRowPerCall


@pytest.mark.parametrize("mode", ["strict", "fast"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_rows_are_not_padded_for_a_network_without_a_mask(mode: Mode, device: str) -> None:
    options = EngineOptions(mode=mode, frame_grid=64)
    policy = choose_policy(replace(ToyModel().spec, pads_rows=False), options, device=device)
    step = [Lane(1, 100), Lane(2, 430), Lane(1, 100), Lane(2, 101)]
    for call in policy.split(step):
        assert {step[i].frames for i in call.members} == {call.frames}


def test_rows_of_equal_length_share_a_call_without_a_mask() -> None:
    calls = EqualLengths(call_ms, knee_tokens, AnyRows()).split([Lane(1, 100), Lane(2, 430), Lane(2, 100)])
    assert [(call.members, call.rows, call.frames) for call in calls] == [((0, 2), 3, 100), ((1,), 2, 430)]
