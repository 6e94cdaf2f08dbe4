"""Compares servers: their audio, capacity, latency at one rate, and goodput. A compared server is called a side.

The sides are measured one after another. Each round has a new list of requests, which is the same for all sides.
Goodput is the highest rate at which nearly all requests are in time. It is found by bisection.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np

from benchmarks.figures import Bracket, bound_ms, capacity_rps, fit_alone_ms, is_good, summarize_sides
from benchmarks.load import Asker, Audio, Record, describe_quiet, in_quiet, play, play_alone
from benchmarks.report import Pieces, write_json
from benchmarks.workload import Arrival, draw_arrivals
from stable_audio_serve.core.generation import GenerationResult, Mode

# Largest allowed difference of two clips: the root mean square of their difference, divided by the root mean square of
# the reference clip. Batching in float32 (at most 1e-5) and rounding quiet clips to 16 bits (1e-4) are below it. A
# decoder in TF32 (8e-4), a denoiser in float16 (above 1e-3) and one step fewer (above 3e-2) are above it.
LARGEST_DIFFERENCE = 5e-4

# For each engine mode: the largest allowed difference between two clips of a request, divided by the clip's level.
_LARGEST_DIFFERENCE = {"strict": 0.0, "fast": 1e-2}

_PROBES_PER_CLASS = 3
_LEAST_DRAWN = 60  # smallest list from which probes are chosen: shorter ones might lack some number of steps
_GOODPUT_RANGE = (0.2, 1.2)  # rates between which goodput is searched, as shares of the server's own capacity
# Length of a goodput trial, in latency bounds of the slowest probe. At 1.2 times the capacity, the wait grows by 0.2 s
# per second. After five bounds it is too long, and the last sixth of the list shows it.
_BOUNDS_PER_TRIAL = 6.0


class VoidError(RuntimeError):
    """The audio of two compared servers differs. They did different work, so the comparison is void."""


class SideFailedError(RuntimeError):
    """A compared server did not return audio. The measurements that are finished are already stored."""


@dataclass(frozen=True, slots=True)
class RunOptions:
    """The options of a comparison. Each round sends a new list of `count` requests.

    A goodput trial sends at least as many. The first of the compared servers (`sides`) is the reference. Latencies are
    measured at a rate of `load_share` times the reference's capacity.
    """

    mix: str
    sides: tuple[str, ...]
    max_duration_s: float
    count: int = 300
    rounds: int = 3
    load_share: float = 0.8
    goodput_trials: int = 6
    goodput_of: tuple[str, ...] | None = None  # servers whose goodput is measured; None: all
    largest_difference: float | None = LARGEST_DIFFERENCE  # bound on the audio's difference; None: do not compare
    warms_up: bool = False  # first send every server one list of requests that is not measured


@dataclass
class Run:
    """One comparison. Finished measurements are stored in `pieces` and are not repeated by a later run.

    `is_watched` is true if all compared servers run in this process or its descendants, so that the load of other
    programs can be detected. Then a round that other programs disturb is repeated.
    """

    askers: Mapping[str, Asker]
    options: RunOptions
    pieces: Pieces
    is_watched: bool = True

    async def measure(self) -> dict[str, Any]:
        """Returns all figures and ratios. Raises VoidError or SideFailedError."""
        options = self.options
        reference = options.sides[0]
        alone = await self.pieces.take("alone", self._probe)
        if options.warms_up:
            for name in self.askers:
                await self._play(name, self._draw(99, rate_hz=None))
        bursts = [await self._round("capacity", number=number, rate_hz=None) for number in range(options.rounds)]
        rate_hz = options.load_share * median(capacity_rps(one["records"][reference]) for one in bursts)
        replays = [await self._round("replay", number=number, rate_hz=rate_hz) for number in range(options.rounds)]
        brackets: dict[str, Bracket] = {}
        trials: list[dict[str, Any]] = []
        if options.goodput_trials:
            probes = [Record(**record) for record in alone["records"]]
            names = options.goodput_of or options.sides
            own_rps = {name: median(capacity_rps(one["records"][name]) for one in bursts) for name in names}
            for name in names:
                brackets[name], own_trials = await self._bisect(name, own_rps=own_rps, probes=probes)
                trials += own_trials
        measured = [*bursts, *replays, *trials]
        return {
            **asdict(options),
            "reference": reference,
            "rate_hz": rate_hz,
            "num_requests": options.count * options.rounds,
            "outputs": alone["outputs"],
            **describe_quiet([one["foreign_cores"] for one in measured]),
            **summarize_sides(
                options.sides,
                bursts=[one["records"] for one in bursts],
                replays=[one["records"] for one in replays],
                brackets=brackets,
            ),
        }

    async def _probe(self) -> dict[str, Any]:
        """Compare every server's audio of a few clips with the reference's. Clips are requested one at a time.

        The reference is the first server. Also measures how long the reference takes for each clip while it is idle.
        """
        arrivals, (reference, *others) = self._choose_probes(), self.options.sides
        clips: dict[str, list[Audio]] = {}
        for name, asker in self.askers.items():
            try:
                clips[name] = [(await asker.ask(arrival)).read() for arrival in arrivals]
            except Exception as error:
                raise SideFailedError(f"{name} failed: {error or type(error).__name__}") from error
            await asker.settle()
        bound = self.options.largest_difference
        outputs = {} if bound is None else compare(clips[reference], {o: clips[o] for o in others}, bound=bound)
        records = _require_answers(reference, await play_alone(self.askers[reference], arrivals))
        return {"outputs": outputs, "records": list(map(asdict, records))}

    def _choose_probes(self) -> list[Arrival]:
        """Returns a few requests of different durations for each number of steps, all due at once."""
        arrivals = self._draw(0, rate_hz=None, count=max(self.options.count, _LEAST_DRAWN))
        chosen = []
        for steps in sorted({arrival.steps for arrival in arrivals}):
            own = sorted((a for a in arrivals if a.steps == steps), key=lambda a: a.duration_s)
            places = {round(i * (len(own) - 1) / (_PROBES_PER_CLASS - 1)) for i in range(_PROBES_PER_CLASS)}
            chosen += [own[place] for place in sorted(places)]
        return chosen

    async def _round(self, kind: str, *, number: int, rate_hz: float | None) -> dict[str, Any]:
        """Send one list of requests to all servers. In every second round, the order of the servers is reversed."""
        arrivals = self._draw(number, rate_hz=rate_hz)
        write_json(self.pieces.folder / f"{kind}-{number + 1}-arrivals.json", list(map(asdict, arrivals)))
        names = list(self.askers) if number % 2 == 0 else list(self.askers)[::-1]
        return await self._send(f"{kind}-{number + 1}", arrivals, names=names)

    async def _send(self, piece: str, arrivals: tuple[Arrival, ...], *, names: Sequence[str]) -> dict[str, Any]:
        """Send the requests to one server after another, again if other programs disturb it.

        Returns the records by server, and how much other programs used the processor.
        """

        async def play_all() -> dict[str, list[dict[str, Any]]]:
            return {name: await self._play(name, arrivals) for name in names}

        async def measure() -> dict[str, Any]:
            records, foreign_cores = await in_quiet(play_all) if self.is_watched else (await play_all(), None)
            return {"records": records, "foreign_cores": foreign_cores}

        measured: dict[str, Any] = await self.pieces.take(piece, measure)
        records = {name: [Record(**record) for record in own] for name, own in measured["records"].items()}
        return measured | {"records": records}

    async def _bisect(
        self, name: str, *, own_rps: Mapping[str, float], probes: Sequence[Record]
    ) -> tuple[Bracket, list[dict[str, Any]]]:
        """Find the highest rate of requests at which the server `name` finishes nearly all requests in time.

        `own_rps` has the capacity of every server. `probes` has the times that clips take on the idle reference server.
        Returns also the measurement of each tried rate.
        """
        low_rps, high_rps = (share * own_rps[name] for share in _GOODPUT_RANGE)
        trial_s = _BOUNDS_PER_TRIAL * max(bound_ms(probe.latency_ms) for probe in probes) / 1000.0
        # Lists of different lengths have different requests, so every trial sends the beginning of equally long lists.
        longest = self._count_of_trial(_GOODPUT_RANGE[1] * max(own_rps.values()), trial_s)
        good_rps: float | None = None
        bad_rps: float | None = None
        alone_ms = fit_alone_ms(probes)
        trials: list[dict[str, Any]] = []
        for trial in range(self.options.goodput_trials):
            rate_hz = (low_rps + high_rps) / 2
            arrivals = self._draw(trial, rate_hz=rate_hz, count=longest)[: self._count_of_trial(rate_hz, trial_s)]
            trials.append(await self._send(f"goodput-{name}-{trial + 1}", arrivals, names=[name]))
            if is_good(trials[-1]["records"][name], alone_ms=alone_ms):
                low_rps = good_rps = rate_hz
            else:
                high_rps = bad_rps = rate_hz
        return Bracket(good_rps, bad_rps), trials

    def _count_of_trial(self, rate_hz: float, trial_s: float) -> int:
        return max(self.options.count, math.ceil(rate_hz * trial_s))

    async def _play(self, name: str, arrivals: tuple[Arrival, ...]) -> list[dict[str, Any]]:
        """Send requests to the server `name`, and return the records as dicts."""
        records = _require_answers(name, await play(self.askers[name], arrivals))
        await self.askers[name].settle()
        return list(map(asdict, records))

    def _draw(self, number: int, *, rate_hz: float | None, count: int | None = None) -> tuple[Arrival, ...]:
        options = self.options
        return draw_arrivals(
            options.mix,
            rate_hz=rate_hz,
            count=count or options.count,
            seed=number + 1,
            max_duration_s=options.max_duration_s,
        )


def _require_answers(name: str, records: list[Record]) -> list[Record]:
    failed = [record for record in records if record.outcome == "failed"]
    if failed:
        raise SideFailedError(f"{name} failed: {failed[0].error}")
    if not any(record.is_finished for record in records):
        raise SideFailedError(f"{name} failed: it refused every request")
    return records


def compare(
    reference: Sequence[Audio], others: Mapping[str, Sequence[Audio]], *, bound: float = LARGEST_DIFFERENCE
) -> dict[str, dict[str, float]]:
    """Returns how much the clips of each server in `others` differ from the clips in `reference`.

    If a server's clips differ by more than `bound`, raises VoidError, which names the server.
    """
    results: dict[str, dict[str, float]] = {}
    for name, clips in others.items():
        differences = [difference(mine, theirs) for mine, theirs in zip(clips, reference, strict=True)]
        results[name] = {
            "num_clips": len(clips),
            "num_identical": sum(map(np.array_equal, clips, reference)),
            "largest_difference": max(differences),
        }
        if not max(differences) <= bound:
            raise VoidError(
                f"{name} is void: clip {int(np.argmax(differences))} differs by {max(differences):.1e} of the "
                f"reference's level (at most {bound:g}); it did other work"
            )
    return results


def compare_audio(
    left: Sequence[GenerationResult], right: Sequence[GenerationResult], *, mode: Mode
) -> dict[str, float]:
    """Compares the first clip of each result in `left` with the first clip of the result at the same index in `right`.

    Returns the differences. Raises VoidError if one is larger than the engine's `mode` allows.
    """
    clips = [[result.audio[0] for result in results] for results in (left, right)]
    return compare(clips[0], {"engine": clips[1]}, bound=_LARGEST_DIFFERENCE[mode])["engine"]


def difference(clip: Audio, reference: Audio) -> float:
    """Returns the root mean square of `clip - reference`, divided by the root mean square of `reference`.

    The result is infinite if the shapes differ, if a value is not finite, or if only the reference is silent.
    """
    if clip.shape != reference.shape or not np.isfinite(clip).all():
        return float("inf")
    change = _level(clip - reference)
    return 0.0 if change == 0 else change / _level(reference) if _level(reference) else float("inf")


def _level(audio: Audio) -> float:
    return float(np.sqrt(np.mean(np.square(audio, dtype=np.float64))))
