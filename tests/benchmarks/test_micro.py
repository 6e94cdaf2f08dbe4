"""The parts of a step by themselves: the timing by a clock of our own, the rest in its shortest form."""

from __future__ import annotations

import pytest

from benchmarks.cases.micro import (
    MicroSizes,
    build_policy,
    draw_works,
    fill_scheduler,
    medians,
    summarize_host_work,
    time_encoders,
    time_in_turns,
    time_scheduler,
    time_tensors,
)
from benchmarks.counting.host_work import Setting
from tests.factories import FakeClock, ToyModel

SIZES = MicroSizes(repetitions=2, slow_repetitions=1, clip_s=0.2)


def test_parts_are_timed_in_turns_after_a_first_run_of_each() -> None:
    clock, order = FakeClock(), []
    quick = iter([9.0, 1.0, 5.0, 3.0, 2.0, 2.0, 8.0])

    def run_quick() -> None:
        order.append("quick")
        clock.now += next(quick) * 1e-6

    def run_slow() -> None:
        order.append("slow")
        clock.now += 100e-6

    taken_us = time_in_turns({"quick": run_quick, "slow": run_slow}, rounds=2, repetitions=3, clock=clock.monotonic)
    assert order == ["quick", "slow"] * 7
    assert taken_us["quick"] == pytest.approx([3.0, 2.0])  # the medians of 1, 5, 3 and of 2, 2, 8
    assert medians(taken_us) == {"quick": pytest.approx(2.5), "slow": pytest.approx(100.0)}


def test_a_pick_among_many_rows_takes_more_than_one_and_not_all() -> None:
    policy, cost = build_policy()
    works = draw_works(256)
    picked = fill_scheduler(256, policy=policy, cost=cost).pick()
    assert 1 < len(picked) < 256
    assert len({work.frames for work in works}) > 100  # unlike lengths, as people ask for
    assert {work.lane.branches for work in works} == {1, 2}


def test_the_scheduler_is_timed_by_active_rows() -> None:
    figures = time_scheduler(1, 2)
    assert set(figures["scheduler_pick_us"]) == {"8", "32", "256"}
    assert set(figures["split_us"]) == {"8", "32", "64"}
    shares = figures["scheduler_share_of_captured_step"]
    assert min(shares.values()) > 0
    ratio = shares["256"] / shares["32"]
    assert figures["scheduler_share_256_over_32_active_ratio"] == pytest.approx(ratio)
    few, many = (figures["scheduler_picked_rows"][active] for active in ("32", "256"))
    assert 1 < few < many  # why a pick is compared by its step and not by itself


def test_tensor_work_and_files_are_timed() -> None:
    figures = time_tensors(ToyModel(), 1, sizes=SIZES)
    assert set(figures) == {"noise_draw_per_row_us", "guidance_of_8_rows_us", "update_of_8_rows_us"}
    files = time_encoders(1, sizes=SIZES)["encode_ms_per_audio_s"]
    assert set(files) == {"wav", "flac", "mp3", "ogg", "opus", "int16"}
    assert all(value > 0 for value in (*figures.values(), *files.values()))


def test_the_worst_step_counts_and_a_mix_up_anywhere() -> None:
    def call(copies: int, waits: int, *, mix_ups: int = 0) -> dict[str, int]:
        return {"blocking_copies": copies, "waits": waits, "asynchronous_copies": 0, "mix_ups": mix_ups}

    counted = [
        (Setting("plain"), {"denoise": call(7, 1), "text": call(50, 50)}),
        (Setting("guided", "strict"), {"denoise": call(10, 0), "text": call(1, 1, mix_ups=2)}),
    ]
    figures = summarize_host_work(counted)
    assert figures["host_blocking_copies_per_step"] == 10
    assert figures["host_waits_per_step"] == 1
    assert figures["host_mix_ups"] == 2
    assert [(work["kind"], work["mode"], work["dtype"]) for work in figures["host_work"]] == [
        ("plain", "fast", "float16"),
        ("guided", "strict", "float16"),
    ]
