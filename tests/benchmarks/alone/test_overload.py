"""Three times as much as a real server can do, on a replica whose device is a clock: what it can do is arithmetic."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.arrivals import Arrival, draw_arrivals
from benchmarks.cases.engine import resolve_model
from benchmarks.cases.overload import summarize_returns
from benchmarks.http_load import LoadGenerator, load_generator
from benchmarks.servers.process import model_args, running_server, write_config
from benchmarks.servers.timed import DEVICE, predict_stages
from benchmarks.workload import Mix
from stable_audio_serve.core.generation import GenerationRequest
from tests.goldens import SA3_GOLDENS

pytestmark = [pytest.mark.ray, pytest.mark.serial, pytest.mark.slow]

MODEL = "sharp-s"
CLIPS = Mix("overload", durations_s=((1.0, 1.0),), steps=((24, 1.0),), spread=0.1)
MAX_QUEUE_S = 1.0
FACTOR = 3.0
INGRESS_REPLICAS = 2  # who is told to come by one asks either


def device_ms(arrival: Arrival) -> float:
    request = GenerationRequest(arrival.prompt, arrival.duration_s, seed=0, steps=arrival.steps)
    return predict_stages(DEVICE, request).total_ms


def overload(seconds: float) -> tuple[Arrival, ...]:
    one_ms = device_ms(Arrival(0.0, "a low drone", 1.0, seed=0, steps=24))
    rate_hz = FACTOR * 1000.0 / one_ms
    return draw_arrivals(CLIPS, rate_hz=rate_hz, count=round(rate_hz * seconds), seed=1, max_duration_s=2.0).arrivals


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoadGenerator]:
    entry = resolve_model(str(SA3_GOLDENS / MODEL))
    model = model_args(entry, name=MODEL, threads=1) | {"max_queue_s": MAX_QUEUE_S}
    folder: Path = tmp_path_factory.mktemp("overload")
    build = "benchmarks.servers.timed:build"
    config = write_config(
        folder, entry, threads=1, import_path=build, models=[model], ingress={"replicas": INGRESS_REPLICAS}
    )
    with running_server(config) as server, load_generator(server.url) as client:
        yield client


@pytest.mark.parametrize("seconds", [6.0, pytest.param(60.0, marks=pytest.mark.chaos)])
def test_the_device_goes_on_working_and_is_as_before_soon_after(*, client: LoadGenerator, seconds: float) -> None:
    arrivals = overload(seconds)
    sent = client.send(MODEL, arrivals).sent
    assert {one.outcome for one in sent} == {"finished", "refused"}
    assert all(one.retry_after_s for one in sent if one.outcome == "refused")
    span_s = arrivals[-1].at_s
    done_ms = sum(
        device_ms(arrival)
        for arrival, one in zip(arrivals, sent, strict=True)
        if one.outcome == "finished" and one.ended_at <= span_s + MAX_QUEUE_S
    )
    assert done_ms / 1000.0 >= 0.9 * span_s
    ends_at = time.monotonic() + 30.0
    while (one := client.send_alone(MODEL, arrivals[:1])[0]).outcome != "finished" or one.queue_ms > 0:
        assert time.monotonic() < ends_at


@pytest.mark.parametrize("seconds", [6.0, pytest.param(30.0, marks=pytest.mark.chaos)])
def test_who_waits_as_told_is_admitted(*, client: LoadGenerator, seconds: float) -> None:
    figures = summarize_returns(client.send_until_admitted(MODEL, overload(seconds)))
    assert figures["refused_at_first"] > 0
    assert figures["never_admitted"] == 0
    assert figures["admitted_on_return_share"] >= 0.9
    assert figures["retry_after_error_share"] <= 0.25
