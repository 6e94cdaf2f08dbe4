"""The simulator: its devices by published figures, its servers by hand, its engine by the real one."""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace
from statistics import mean

import pytest

from benchmarks.arrivals import Arrival, to_request
from benchmarks.cases.simulate import SimulationSizes, compare_demo, run_simulate_case
from benchmarks.compare.asking import InProcess
from benchmarks.compare.playing import play
from benchmarks.settings import CaseSettings
from benchmarks.sides.servers import open_side
from benchmarks.sides.timed_model import TimedModel
from benchmarks.simulate.day import draw_day, load_of_hour
from benchmarks.simulate.devices import LinearDevice
from benchmarks.simulate.engine import CPU, GPU, SimulatedEngine
from benchmarks.simulate.formula import DEMO_ON_A_CPU
from benchmarks.simulate.queues import Queues
from benchmarks.simulate.requests import Shape
from benchmarks.simulate.rivals import run_lock, run_static
from benchmarks.simulate.roofline import MEDIUM, OPEN, SMALL, Network, h200
from benchmarks.workload import MIXES
from stable_audio_serve.engine import Engine, EngineOptions
from stable_audio_serve.engine.graphs import MOST_GRAPHS
from tests.engine.two_queues import TwoQueues
from tests.factories import FakeClock
from tests.patience import PATIENCE_S

SHAPE = Shape(frames=lambda duration_s: math.ceil(10 * duration_s), windows=lambda frames: (frames,))
TIMED_SHAPE = Shape(frames=lambda duration_s: math.ceil(duration_s * 689 / 64), windows=lambda frames: (frames,))
OPTIONS = EngineOptions(mode="fast", frame_grid=64, torch_threads=1, warmup_budget_s=60.0)
DEVICE = LinearDevice(
    text_fixed_ms=10.0, step_fixed_ms=10.0, step_per_frame_ms=0.1, coding_fixed_ms=20.0, coding_per_frame_ms=0.2
)


def arrive(at_s: float, duration_s: float, *, steps: int = 2, guided: bool = False, prompt: str = "a") -> Arrival:
    cfg_scale = 4.0 if guided else 1.0
    return Arrival(at_s, prompt, duration_s, seed=int(1000 * at_s + 10 * duration_s), steps=steps, cfg_scale=cfg_scale)


def make_times(unit_ms: float) -> LinearDevice:
    """What a call costs besides, and what 150 frames of a step and 300 of a window cost, is one unit each."""
    return LinearDevice(
        text_fixed_ms=unit_ms,
        step_fixed_ms=unit_ms,
        step_per_frame_ms=unit_ms / 150,
        coding_fixed_ms=unit_ms,
        coding_per_frame_ms=unit_ms / 300,
    )


# Operations of one step of a row and of a whole clip in units of 1e12, from the published checkpoints' dimensions with
# nothing kept between steps.
@pytest.mark.parametrize(
    ("network", "duration_s", "step", "clip"),
    [
        (SMALL, 5, 0.118, 1.09),
        (SMALL, 30, 0.353, 3.48),
        (SMALL, 120, 1.295, 12.8),
        (MEDIUM, 5, 0.390, 3.95),
        (MEDIUM, 30, 1.129, 13.8),
        (MEDIUM, 120, 4.132, 52.0),
        (MEDIUM, 380, 15.93, 187.0),
    ],
)
def test_operations_are_those_of_the_published_networks(
    network: Network, duration_s: float, step: float, clip: float
) -> None:
    frames = network.frames(duration_s)
    assert network.step_operations(frames, is_cached=False) / 1e12 == pytest.approx(step, rel=0.03)
    whole = 8 * network.step_operations(frames, is_cached=False) + network.decode_operations(frames)
    assert whole / 1e12 == pytest.approx(clip, rel=0.05)  # without text
    assert network.step_operations(frames) < network.step_operations(frames, is_cached=False)


def test_a_guided_step_of_stable_audio_open_has_its_operations() -> None:
    assert 2 * OPEN.step_operations(1024, is_cached=False) / 1e12 == pytest.approx(4.560, rel=0.03)
    clip = 200 * OPEN.step_operations(1024, is_cached=False) + OPEN.decode_operations(1024)
    assert clip / 1e12 == pytest.approx(461.0, rel=0.04)


def test_a_device_is_bound_by_bytes_then_by_operations_and_by_its_host() -> None:
    device = h200(SMALL)
    assert device.step_ms(1, 54) == pytest.approx(1.4 + 1000 * 2 * SMALL.num_weights / 4.3e12 / 0.55, rel=0.2)
    assert device.step_ms(64, 1292) == pytest.approx(1.4 + 1000 * 64 * SMALL.step_operations(1292) / 790e12 / 0.55)
    assert device.packed_step_ms([(1, 54), (2, 324)]) < device.step_ms(3, 324)
    assert h200(SMALL, is_captured=False).step_ms(1, 54) == 12.0


def test_a_lock_by_hand() -> None:
    # text 10, steps 2 x (10 + 0.1 x 10), decode 20 + 0.2 x 10: 54; guided 2 x 12 + 22: 46, its text is known
    outcomes = run_lock([arrive(0, 1), arrive(0.01, 1, guided=True), arrive(1, 1)], DEVICE, shape=SHAPE)
    assert [outcome.ended_at for outcome in outcomes] == pytest.approx([0.054, 0.054 + 0.046, 1.044])
    assert [outcome.latency_ms for outcome in outcomes] == pytest.approx([54, 90, 44])


def test_static_batches_by_hand() -> None:
    arrivals = [arrive(0, 1), arrive(0.005, 2), arrive(0.006, 1, steps=3), arrive(0.012, 1, prompt="b")]
    outcomes = {outcome.arrival: outcome.ended_at for outcome in run_static(arrivals, DEVICE, shape=SHAPE)}
    # at 10 ms the first two together: text 10, 2 x (10 + 0.1 x 2 x 20), windows of 10 and 20 frames: 22 + 24
    first = 0.010 + 0.010 + 0.028 + 0.046
    # then the one with three steps: 3 x 11 + 22; then the late one, whose prompt is new
    second = first + 0.055
    third = max(second, first + 0.010) + 0.010 + 0.022 + 0.022
    assert [outcomes[arrival] for arrival in arrivals] == pytest.approx([first, first, second, third])


def test_the_engine_by_hand() -> None:
    engine = SimulatedEngine(DEVICE, SHAPE, longest_frames=128)
    (outcome,) = engine.run([arrive(0, 1)])
    assert outcome.ended_at == pytest.approx(0.010 + 2 * (0.010 + 0.0064) + 0.022)  # a row of 10 frames is padded to 64
    assert (engine.counts.turns, engine.counts.calls, engine.counts.shapes) == (3, 2, {(1, 64)})
    assert (engine.counts.tokens, engine.counts.padded_tokens) == (20, 128)


def test_two_queues_by_hand() -> None:
    queues: Queues[str] = Queues()
    first, second = queues.ask(3.0, "a"), queues.ask(4.0, "b", "c")
    queues.rest(5.0)
    assert (queues.ended, queues.has_ended(first), queues.has_ended(second)) == ([("a", 3.0)], True, False)
    queues.run(10.0)  # behind what the second queue has left: 2 of 4
    assert queues.now_ms == 17.0
    assert queues.ended[1:] == [("b", 7.0), ("c", 7.0)]
    last = queues.ask(6.0)
    queues.run(10.0, gap_ms=4.0)  # for 4 of its 10 the device is not its own
    assert queues.now_ms == 17.0 + 6.0 + 10.0 - 4.0
    queues.wait(last)
    queues.run(1.0, gap_ms=1.0)
    assert queues.now_ms == 30.0


def test_windows_run_beside_the_steps_of_others_by_hand() -> None:
    """The first row steps twice, then decodes beside the second one's third step; both have the prompt."""
    for kind in (GPU, replace(GPU, has_second_queue=False)):
        engine = SimulatedEngine(DEVICE, SHAPE, longest_frames=128, kind=kind)
        first, second = engine.run([arrive(0, 1), arrive(0, 1, steps=4)])
        step_ms, window_ms = 10.0 + 0.1 * 2 * 64, 22.0
        last_ms = 10.0 + 0.1 * 64
        assert first.ended_at == pytest.approx((10.0 + 2 * step_ms + window_ms) / 1000.0)
        assert second.ended_at == pytest.approx((10.0 + 2 * step_ms + 2 * window_ms + 2 * last_ms) / 1000.0)
        assert engine.counts.turns == 5


def test_equal_rows_share_calls_and_packed_rows_need_no_padding() -> None:
    arrivals = [arrive(0, 1, prompt=str(index)) for index in range(8)]
    engine = SimulatedEngine(DEVICE, SHAPE, longest_frames=128)
    engine.run(arrivals)
    assert engine.counts.shapes == {(8, 64)}
    packed = SimulatedEngine(
        DEVICE, SHAPE, longest_frames=128, kind=CPU, pack=lambda call: 10 + 0.1 * sum(call.lengths)
    )
    outcomes = packed.run(arrivals)
    assert packed.counts.padded_tokens == packed.counts.tokens == 160
    assert max(outcome.ended_at for outcome in outcomes) == pytest.approx(0.010 + 2 * 0.018 + 0.036)


@pytest.mark.slow
async def test_the_simulated_engine_takes_as_long_as_the_real_one() -> None:
    unit_ms = max(30.0, 30.0 * await host_ms_per_turn())  # so that the device's time counts, on a slow machine too
    device = make_times(unit_ms)
    arrivals = [
        arrive(0.002 * unit_ms * n, (1.0, 5.0, 11.0)[n % 3], steps=4 if n % 4 else 8, guided=not n % 4)
        for n in range(9)
    ]
    simulated = SimulatedEngine(device, TIMED_SHAPE, longest_frames=216, options=OPTIONS, kind=CPU).run(arrivals)
    model = TimedModel(device, max_duration_s=20.0)
    asker = InProcess(open_side("ours", model, options=OPTIONS), model.spec.card)
    await play(asker, [arrive(0, 1, prompt="first")])  # warms up
    records = await play(asker, arrivals)
    assert mean(r.latency_ms for r in records) == pytest.approx(mean(o.latency_ms for o in simulated), rel=0.1)
    assert max(r.ended_at for r in records) == pytest.approx(max(o.ended_at for o in simulated), rel=0.1)


async def test_with_two_queues_the_real_engine_takes_as_long_on_a_virtual_clock() -> None:
    """All but one arrive while that one is begun. The real engine decides a step or two ahead of its device."""
    times = make_times(30.0)
    first = arrive(0, 1.0, prompt="first")
    arrivals = [
        arrive(0.001, (1.0, 5.0, 11.0)[n % 3], steps=4 if n % 4 else 8, guided=not n % 4, prompt=f"{n}")
        for n in range(24)
    ]
    kind = replace(CPU, has_second_queue=True)
    simulator = SimulatedEngine(times, TIMED_SHAPE, longest_frames=216, options=OPTIONS, kind=kind)
    simulated = [outcome for outcome in simulator.run([first, *arrivals]) if outcome.arrival != first]
    clock = FakeClock()
    device = TwoQueues(clock)
    model = TimedModel(times, max_duration_s=20.0, sleep=device.take)
    async with Engine(model, OPTIONS, device=device, clock=clock) as engine:
        device.gate.clear()
        device.is_asked.clear()
        tasks = [asyncio.create_task(engine.generate(to_request(first, model.spec.card)))]
        assert await asyncio.to_thread(device.is_asked.wait, PATIENCE_S)
        for arrival in arrivals:
            backlog_ms = engine.backlog_ms
            tasks.append(asyncio.create_task(engine.generate(to_request(arrival, model.spec.card))))
            async with asyncio.timeout(PATIENCE_S):
                while engine.backlog_ms == backlog_ms:  # noqa: ASYNC110 - another thread accepts it
                    await asyncio.sleep(0.002)
        device.gate.set()
        latencies_ms = [result.timings.total_ms for result in (await asyncio.gather(*tasks))[1:]]
    assert mean(latencies_ms) == pytest.approx(mean(o.latency_ms for o in simulated), rel=0.15)
    assert max(latencies_ms) == pytest.approx(max(o.latency_ms for o in simulated), rel=0.05)


async def host_ms_per_turn() -> float:
    """What the real engine itself takes of a turn on this machine."""
    model = TimedModel(LinearDevice(0.0, 0.0, 0.0, 0.0, 0.0), max_duration_s=20.0)
    asker = InProcess(open_side("ours", model, options=OPTIONS), model.spec.card)
    (_, record) = [(await play(asker, [arrive(0, 5, steps=50, prompt=prompt)]))[0] for prompt in ("first", "second")]
    return record.latency_ms / 52


def test_a_day_rises_to_more_than_the_capacity_without_a_pause() -> None:
    day = draw_day(MIXES["small-mixed"], capacity_hz=2.0, count=1000, seed=1, max_duration_s=120.0)
    due_s = [arrival.at_s for arrival in day]
    assert due_s == sorted(due_s)
    assert len(due_s) == 24 * 1000
    # 0.12 x 2 per second in the first hour, 1.2 x 2 in the thirteenth: of 1,000 gaps the mean is known within 3.2 %
    assert 1000 / due_s[999] == pytest.approx(0.24, rel=0.1)
    assert 1000 / (due_s[12_999] - due_s[11_999]) == pytest.approx(2.4, rel=0.1)
    assert load_of_hour(6) == pytest.approx(0.66)


def test_a_days_shapes_and_every_ratio_are_stated() -> None:
    sizes = SimulationSizes(small=80, other=80, demo=60, hour=4, seeds=(1, 2), clips=40)
    results = run_simulate_case(CaseSettings(), sizes)
    assert set(results["days"]) == {"small-mixed", "medium-mixed"}
    for day in results["days"].values():
        assert 0 < day["num_shapes"] <= day["num_calls"]
        assert day["num_shapes_without_graphs"] > 0
        assert day["num_shapes"] + day["num_text_shapes"] + day["num_decode_shapes"] <= MOST_GRAPHS
    for mix, figures in results["mixes"].items():
        batchings = {"strict", "fast"} if mix == "demo-wide" else {"grid", "packed"}
        assert figures.keys() - {"num_requests"} == batchings
        for batching in batchings:
            steps = {f"p95_{steps}_over_lock_ratio" for steps, _ in MIXES[mix].steps}
            assert steps < set(figures[batching])
            assert all(value > 0 for value in figures[batching].values())
    for mix in results["mixes"].keys() - {"demo-wide"}:
        figures = results["mixes"][mix]
        assert figures["packed"]["capacity_over_lock_ratio"] >= 0.99 * figures["grid"]["capacity_over_lock_ratio"]
    assert all(ratio["grid"] > 0 for ratio in results["clips_over_published_ratio"].values())


def test_one_row_at_a_time_costs_no_capacity_on_a_cpu() -> None:
    ratios = compare_demo(count=60, seed=1)
    assert ratios["strict"]["capacity_over_lock_ratio"] == pytest.approx(1.0, rel=0.01)
    assert ratios["fast"]["capacity_over_lock_ratio"] > 1.1


def test_the_demos_device_takes_what_the_demo_takes() -> None:
    for frames, step_ms, decode_ms in ((16, 3.6, 3.0), (48, 4.9, 8.2), (112, 9.0, 16.6)):
        assert DEMO_ON_A_CPU.step_ms(1, frames) == pytest.approx(step_ms, rel=0.01)
        assert DEMO_ON_A_CPU.decode_ms(1, frames) == pytest.approx(decode_ms, rel=0.06)
    assert DEMO_ON_A_CPU.packed_step_ms([(1, 48), (2, 48)]) == pytest.approx(DEMO_ON_A_CPU.step_ms(3, 48))
