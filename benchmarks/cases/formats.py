"""What encoding files costs those who wait for the model: one list of requests, all as MP3 and all as WAV in turns over
HTTP, then in mixed formats, while somebody else asks for `/health`. Every answer is decoded and its length checked.

The list is sent from another process, so that receiving it does not slow the one that watches.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import httpx

from benchmarks.arrivals import Arrival, draw_arrivals
from benchmarks.cases.engine import resolve_model
from benchmarks.cases.uploads import probe
from benchmarks.client import another_process
from benchmarks.compare.asking import Answer, Asker
from benchmarks.compare.dialects import DIALECTS, OverHttp, open_session
from benchmarks.compare.playing import Record, play
from benchmarks.compare.quiet import describe_quiet, measure_in_quiet
from benchmarks.metrics import percentile, summarize, worst_ratio
from benchmarks.servers.process import Server, running_server, write_config
from benchmarks.settings import CaseSettings

_MIX = "formats"
_SIDES = ("mp3", "wav")
_WARM_UP = 8
_CROWD_LOAD, _MIX_LOAD = 2.5, 0.6  # of what the engine can do: always enough to work on; room to breathe
_OPUS_RATE_HZ = 48_000
_TOLERANCE_SAMPLES = 2  # lossy formats may round
_PROBES = {"health": ("/health", 200), "event_loop": ("/nowhere", 404)}
_IDLE_PROBES = 100
_PROBE_EVERY_S = 0.05  # more often, and answering takes time from the model
_INCLUDES = (
    "event_loop: a path that does not exist, answered by the event loop itself, with connection, proxy and their "
    "waiting for a processor, but not the watcher's; health: also the ingress asking the model's replica; both counted "
    "from the time each was due"
)
_unchecked: list[tuple[Arrival, Answer]] = []  # what lists brought, in the process that sent them


@dataclass(frozen=True, slots=True)
class FormatSizes:
    """Requests of one run, and the longest clip: the mix's own lengths are for a GPU."""

    requests: int = 150
    longest_s: float = 10.0


FULL = FormatSizes()
SHORT = FormatSizes(requests=24)


@dataclass(frozen=True, slots=True)
class Run:
    """One list, sent and checked, with what watchers saw meanwhile, milliseconds by name."""

    records: Sequence[Record]
    probes_ms: Mapping[str, Sequence[float]]

    @property
    def engine_s(self) -> float:
        """Seconds from the start of the list to the engine's last audio."""
        return max(record.due_at + _engine_s(record.stages_ms) for record in self.records)

    @property
    def step_rate_hz(self) -> float:
        """Finished steps per second until the engine's last audio; the engine must always have had work."""
        return sum(record.steps for record in self.records) / self.engine_s

    @property
    def requests_per_s(self) -> float:
        """To the last byte of the last file."""
        return len(self.records) / max(record.ended_at for record in self.records)


class Keeping:
    """Asks another and keeps its answers."""

    def __init__(self, asker: Asker) -> None:
        self._asker = asker
        self.answers: list[tuple[Arrival, Answer]] = []

    async def ask(self, arrival: Arrival) -> Answer:
        answer = await self._asker.ask(arrival)
        self.answers.append((arrival, answer))
        return answer


def run_formats_case(settings: CaseSettings, *, sizes: FormatSizes | None = None) -> dict[str, Any]:
    """A B A B and once the mix in every round; the worse round counts. Raises RuntimeError for a wrong answer."""
    sizes = sizes or (FULL if settings.full else SHORT)
    entry = resolve_model(settings.model)
    longest_s = min(sizes.longest_s, entry.card.max_duration_s)
    draw = partial(draw_arrivals, _MIX, count=sizes.requests, seed=1, max_duration_s=longest_s)
    with tempfile.TemporaryDirectory() as folder, another_process() as sender:
        config = write_config(Path(folder), entry, threads=settings.threads)
        with running_server(config) as server:
            list_runner = ListRunner(server, sender, model=entry.card.name, sample_rate_hz=entry.card.sample_rate_hz)
            warm_up = replace(draw(rate_hz=None), arrivals=draw(rate_hz=None).arrivals[:_WARM_UP])
            list_runner.send(warm_up.arrivals)  # starts the process and the server's encoders
            full_hz = len(warm_up) / list_runner.send(warm_up.arrivals).engine_s
            idle = list_runner.watch(lambda probes: len(probes) < _IDLE_PROBES)
            crowd, mixed = draw(rate_hz=_CROWD_LOAD * full_hz), draw(rate_hz=_MIX_LOAD * full_hz)
            measured = [
                measure_in_quiet(partial(_round, list_runner, crowd.arrivals, mixed=mixed.arrivals))
                for _ in range(settings.rounds)
            ]
    rounds = [runs for runs, _ in measured]
    return {
        "sizes": asdict(sizes),
        "crowd_hz": crowd.rate_hz,
        "mix_hz": mixed.rate_hz,
        **compare_sides(rounds),
        **describe_probes(rounds, idle=idle),
        "mix": _describe_mix(mixed.arrivals, [runs["mix"][0].records for runs in rounds]),
        "answers_checked": list_runner.num_checked,
        **describe_quiet([watch for _, watch in measured]),
    }


def _round(list_runner: ListRunner, crowd: Sequence[Arrival], *, mixed: Sequence[Arrival]) -> dict[str, list[Run]]:
    runs: dict[str, list[Run]] = {side: [] for side in _SIDES}
    for side in (*_SIDES, *_SIDES):
        runs[side].append(list_runner.send([replace(arrival, audio_format=side) for arrival in crowd]))
    return runs | {"mix": [list_runner.send(mixed)]}


class ListRunner:
    """Sends lists to one server from another process and watches the server meanwhile."""

    def __init__(self, server: Server, sender: ProcessPoolExecutor, *, model: str, sample_rate_hz: int) -> None:
        self._url = server.url
        self._sender = sender
        self._model = model
        self._sample_rate_hz = sample_rate_hz
        self.num_checked = 0  # answers that were decoded and had the right length

    def send(self, arrivals: Sequence[Arrival]) -> Run:
        """Raises RuntimeError for an answer that is not what was asked for."""
        sending: Future[list[Record]] = self._sender.submit(send_list, self._url, arrivals, model=self._model)
        probes_ms = self.watch(lambda _: not sending.done())
        records = sending.result()
        self.num_checked += self._sender.submit(check_answers, sample_rate_hz=self._sample_rate_hz).result()
        return Run(records, probes_ms)

    def watch(self, goes_on: Callable[[list[float]], bool]) -> dict[str, list[float]]:
        """Milliseconds of each probe, all of them at once."""
        with httpx.Client(base_url=self._url, timeout=30.0, trust_env=False) as client:
            with ThreadPoolExecutor(len(_PROBES)) as pool:
                probes = {
                    name: pool.submit(probe, client, goes_on, path=path, expected=status, every_s=_PROBE_EVERY_S)
                    for name, (path, status) in _PROBES.items()
                }
            return {name: future.result() for name, future in probes.items()}


def send_list(url: str, arrivals: Sequence[Arrival], *, model: str | None) -> list[Record]:
    """Send a list at its times; its answers wait for `check_answers` in the same process.

    Raises RuntimeError for a refusal.
    """

    async def run() -> list[Record]:
        async with open_session(url) as http:
            keeping = Keeping(OverHttp(http, DIALECTS["sa3"], model=model))
            records = await play(keeping, arrivals)
        if any(record.refused for record in records):
            raise RuntimeError("the server refused a part of the list")
        _unchecked.extend(keeping.answers)
        return records

    return asyncio.run(run())


def check_answers(*, sample_rate_hz: int) -> int:
    """Decode everything that was sent back in this process. Returns how many answers these were.

    Raises RuntimeError for no audio and for audio of a wrong length.
    """
    answers = _unchecked.copy()
    _unchecked.clear()
    for arrival, answer in answers:
        check_length(arrival, answer, sample_rate_hz=sample_rate_hz)
    return len(answers)


def check_length(arrival: Arrival, answer: Answer, *, sample_rate_hz: int) -> None:
    """Decode an answer. Raises RuntimeError if it is no audio or not as long as was asked for."""
    rate_hz = _OPUS_RATE_HZ if arrival.audio_format == "opus" else sample_rate_hz
    samples, expected = answer.read().shape[-1], arrival.duration_s * rate_hz
    if abs(samples - expected) > _TOLERANCE_SAMPLES:
        raise RuntimeError(f"{samples} samples instead of {expected:.0f} came as {arrival.audio_format}")


def compare_sides(rounds: Sequence[Mapping[str, Sequence[Run]]]) -> dict[str, Any]:
    """Step rate with MP3 files over that with WAV files; in each round the means of its runs."""
    rates_hz = [{side: mean(run.step_rate_hz for run in runs[side]) for side in _SIDES} for runs in rounds]
    pairs = [(rates["mp3"], rates["wav"]) for rates in rates_hz]
    return {
        "mp3_over_wav_step_rate_ratio": worst_ratio(pairs, larger_is_better=True),
        "mp3_over_wav_step_rate_ratio_rounds": [mp3 / wav for mp3, wav in pairs],
        "steps_per_s": {side: median(rates[side] for rates in rates_hz) for side in _SIDES},
        "files_per_s": {side: median(run.requests_per_s for sides in rounds for run in sides[side]) for side in _SIDES},
    }


def describe_probes(
    rounds: Sequence[Mapping[str, Sequence[Run]]], *, idle: Mapping[str, Sequence[float]]
) -> dict[str, Any]:
    """p99 of the probes of each kind of run, worst round; what counts is the worse of all MP3 and the mix."""
    p99_ms = {
        name: {
            kind: [percentile([ms for run in runs[kind] for ms in run.probes_ms[name]], 0.99) for runs in rounds]
            for kind in rounds[0]
        }
        for name in _PROBES
    }
    worst_ms = {name: max(*kinds["mp3"], *kinds["mix"]) for name, kinds in p99_ms.items()}
    return {
        "event_loop_stall_p99_ms": worst_ms["event_loop"],
        "health_p99_ms": worst_ms["health"],
        "probes_p99_ms_rounds": p99_ms,
        "probes_idle": {name: asdict(summarize(values)) for name, values in idle.items()},
        "probes_per_round": {
            kind: [sum(len(run.probes_ms["event_loop"]) for run in runs[kind]) for runs in rounds] for kind in rounds[0]
        },
        "probes_include": _INCLUDES,
    }


def _describe_mix(arrivals: Sequence[Arrival], rounds: Sequence[Sequence[Record]]) -> dict[str, Any]:
    """Latencies of the mixed list by format, over all rounds."""
    by_format: dict[str, list[Record]] = {}
    for records in rounds:
        for record in records:
            by_format.setdefault(arrivals[record.index].audio_format, []).append(record)
    return {
        audio_format: {
            "requests": len(records),
            "encode_ms_per_audio_s": median(record.stages_ms["encode"] / record.audio_s for record in records),
            **asdict(summarize([record.latency_ms for record in records])),
        }
        for audio_format, records in sorted(by_format.items())
    }


def _engine_s(stages_ms: Mapping[str, float]) -> float:
    """Seconds from a request's arrival at the engine to its audio."""
    return (stages_ms["total"] - stages_ms["encode"]) / 1000.0


def rows(results: Mapping[str, Any]) -> list[dict[str, object]]:
    """What encoding files costs those who wait for the model."""
    return [
        {
            "mp3_over_wav_step_rate": results["mp3_over_wav_step_rate_ratio"],
            "event_loop_stall_p99_ms": results["event_loop_stall_p99_ms"],
            "health_p99_ms": results["health_p99_ms"],
            "answers_checked": results["answers_checked"],
        }
    ]
