"""What the harness asks of a running server: all of it of one, the API around an engine that takes no time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import aiohttp
import httpx
import pytest

from benchmarks.arrivals import Arrival, draw_arrivals
from benchmarks.cases.formats import check_answers, send_list
from benchmarks.cases.jobs_http import send
from benchmarks.cases.overhead import ROUTES, measure_route
from benchmarks.cases.run import DIALECT_NAMES, URL_SIDE, RunRequest, run_comparison
from benchmarks.cases.uploads import make_file, measure_round
from benchmarks.compare.dialects import DIALECTS, OverHttp, open_session
from benchmarks.compare.playing import play
from benchmarks.http_load import Load, load_generator, require_clips
from benchmarks.servers.process import Server, running_instant_app
from benchmarks.settings import CaseSettings
from tests.patience import PATIENCE_S

pytestmark = pytest.mark.slow

WAITING_DIALECTS = tuple(name for name in DIALECT_NAMES if name != "aiml")  # that one's jobs need a runner


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running_instant_app() as server:
        yield server


async def test_any_server_can_be_measured_in_its_dialect(server: Server, tmp_path: Path) -> None:
    for dialect in WAITING_DIALECTS:
        request = RunRequest("demo-fast", url=server.url, dialect=dialect, count=6, goodput_trials=1)
        results = await run_comparison(CaseSettings(rounds=1), request, folder=tmp_path / dialect)
        side = results["sides"][URL_SIDE]
        assert min(side["capacity_rps"]) > 0, dialect
        assert side["latency"]["all"]["p95_ms"] > 0, dialect


async def test_every_dialect_brings_the_clip_that_was_asked_for(server: Server) -> None:
    arrival = Arrival(at_s=0.0, prompt="rain", duration_s=2.0, seed=1, steps=8)
    async with open_session(server.url) as http:
        for name in WAITING_DIALECTS:
            dialect = DIALECTS[name]
            audio = (await OverHttp(http, dialect).ask(arrival)).read()
            assert audio.shape == (2, 88_200), name
            with pytest.raises(RuntimeError):
                await OverHttp(http, dialect).ask(replace(arrival, steps=100_000))


async def test_edits_and_formats_are_asked_for(server: Server) -> None:
    edits = draw_arrivals("edit", rate_hz=None, count=12, seed=1, max_duration_s=4.0)
    formats = draw_arrivals("formats", rate_hz=None, count=12, seed=1, max_duration_s=4.0)
    assert {arrival.mode for arrival in edits} == {"text-to-audio", "variation", "inpaint"}
    async with open_session(server.url) as http:
        asker = OverHttp(http, DIALECTS["sa3"])
        assert len(await play(asker, edits)) == len(await play(asker, formats)) == 12


async def test_what_a_server_refuses_is_no_answer(server: Server) -> None:
    async with open_session(server.url) as http:
        with pytest.raises(RuntimeError, match="422"):
            await OverHttp(http, DIALECTS["sa3"]).ask(Arrival(0.0, "", 1.0, seed=1, steps=8))  # no prompt
    async with open_session("http://127.0.0.1:1") as http:
        with pytest.raises(aiohttp.ClientError):
            await OverHttp(http, DIALECTS["sa3"]).ask(Arrival(0.0, "x", 1.0, seed=1, steps=8))


def test_the_client_gets_clips_of_the_length_asked_for_from_a_real_server(server: Server) -> None:
    lengths_s = (1.0, 0.5123, 2.0)
    arrivals = [Arrival(0.05 * index, "a bell", s, seed=1, steps=8) for index, s in enumerate(lengths_s)]
    with load_generator(server.url) as client:
        load = client.send("demo", arrivals)
        (alone,) = client.send_alone("demo", arrivals[2:])
    require_clips(load, arrivals, channels=2, sample_rate_hz=44_100)
    with pytest.raises(RuntimeError, match=rf"1\.000 s .* finished, {alone.num_bytes} bytes, 352800 of"):
        require_clips(Load([alone], 0.0), arrivals[:1], channels=2, sample_rate_hz=44_100)
    assert [sent.due_at for sent in load.sent] == [0.0, 0.05, 0.1]
    assert all(sent.due_at <= sent.sent_at <= sent.ended_at for sent in load.sent)
    assert alone.due_at == 0.0
    assert 0.0 < alone.added_ms <= alone.latency_ms


def test_a_list_in_every_format_is_sent_and_decoded(server: Server) -> None:
    formats = ("wav", "flac", "mp3", "opus")
    arrivals = [
        Arrival(0.01 * index, "a bell", duration_s=1.0 + 0.123 * index, seed=index, steps=8, audio_format=audio_format)
        for index, audio_format in enumerate(formats)
    ]
    records = send_list(server.url, arrivals, model=None)
    assert check_answers(sample_rate_hz=44_100) == 4
    assert [record.index for record in records] == [0, 1, 2, 3]
    assert all(record.stages_ms["encode"] > 0 for record in records)
    send_list(server.url, arrivals[:1], model=None)
    with pytest.raises(RuntimeError, match="44100 samples instead of 48000 came as wav"):
        check_answers(sample_rate_hz=48_000)


def test_the_instant_engine_answers_every_route_of_the_overhead_case(server: Server) -> None:
    with httpx.Client(base_url=server.url, timeout=PATIENCE_S, trust_env=False) as client:
        for route in ROUTES:
            figures = measure_route({"app": client, "serve": client}, route, rounds=1, calls=2)
            assert 0 < figures["worst_round_p50_ms"]["app"] <= figures["latency"]["app"]["p95_ms"], route.name


def test_uploads_and_health_are_timed_against_a_real_server(server: Server) -> None:
    figures = measure_round(server, make_file("WAV", duration_s=2.0), every_s=0.05, file_s=2.0, idle_probes=5)
    assert figures["realtime_factor"] > 1
    assert 0 < figures["health_during_uploads"]["p50_ms"] <= figures["health_during_uploads"]["p95_ms"]


def test_a_load_is_sent_at_its_own_times_and_refuses_to_time_errors(server: Server) -> None:
    body = {"prompt": "x", "duration": 1}
    started_at = time.perf_counter()
    tickets = send(server.url, [("POST", "/jobs", body)] * 20, rate_hz=40.0)
    assert time.perf_counter() - started_at > 19 / 40
    polls = send(server.url, [("GET", f"/jobs/{ticket.answer['id']}", None) for ticket in tickets], rate_hz=100.0)
    assert {poll.answer["status"] for poll in polls} == {"queued"}
    assert all(sent.latency_ms > 0 for sent in (*tickets, *polls))
    with pytest.raises(RuntimeError, match="422"):
        send(server.url, [("POST", "/jobs", {})], rate_hz=10.0)
