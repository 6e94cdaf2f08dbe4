"""One comparison from beginning to end: outputs, capacity, the same arrivals at one rate, goodput by bisection.

Sides take turns (A B A B); every round draws its own list. Knows no files but the pieces', and not how sides start.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

from tqdm import tqdm

from benchmarks.arrivals import Arrival, ArrivalList, draw_arrivals
from benchmarks.compare.asking import Asker, Audio
from benchmarks.compare.figures import Bracket, capacity_rps, fit_alone_ms, is_good
from benchmarks.compare.outputs import LARGEST_DIFFERENCE, compare
from benchmarks.compare.pieces import Pieces
from benchmarks.compare.playing import Record, play, read_records, write_records
from benchmarks.compare.quiet import Watch, wait_in_quiet
from benchmarks.compare.summary import summarize_sides

_PROBES_PER_CLASS = 3
_LEAST_DRAWN = 60  # requests from which probes are chosen: among fewer a class of steps may be missing
_GOODPUT_RANGE = (0.2, 1.2)  # of the side's own capacity


class SideFailedError(RuntimeError):
    """A side gave another answer than audio, or none; what was measured before is kept."""


class OutOfTimeError(RuntimeError):
    """The time budget ended before the run did; what is measured is kept."""


@dataclass(frozen=True, slots=True)
class RunOptions:
    """`count` requests in each list, a list per round; the first side is the reference whose capacity sets the rate."""

    mix: str
    sides: tuple[str, ...]
    max_duration_s: float
    count: int = 300
    rounds: int = 3
    load_share: float = 0.8
    goodput_trials: int = 6
    goodput_of: tuple[str, ...] | None = None  # None: all sides
    largest_difference: float | None = LARGEST_DIFFERENCE  # of outputs; None: they cannot be compared


@dataclass(frozen=True, slots=True)
class Round:
    """What became of one list, by side; void if other programs used over a tenth of a core each time it was played."""

    records: Mapping[str, Sequence[Record]]
    foreign_cores: float | None
    is_void: bool


class Run:
    """Measures piece by piece; finished pieces are not measured again."""

    def __init__(
        self,
        askers: Mapping[str, Asker],
        options: RunOptions,
        *,
        pieces: Pieces,
        is_watched: bool = True,
        budget_s: float = float("inf"),
    ) -> None:
        """`is_watched`: all sides run on this machine and below this process, so others' use of it can be seen; then a
        round that is void is repeated. After `budget_s` no new piece begins.
        """
        self._askers = askers
        self._options = options
        self._pieces = pieces
        self._is_watched = is_watched
        self._ends_at = time.monotonic() + budget_s

    async def measure(self) -> dict[str, Any]:
        """Returns figures and ratios. Raises VoidError, and OutOfTimeError when the budget ends before."""
        options = self._options
        alone = await self._take("alone", self._probe)
        bursts = [await self._round("capacity", number=number, rate_hz=None) for number in range(options.rounds)]
        reference = options.sides[0]
        rate_hz = options.load_share * median(capacity_rps(one.records[reference]) for one in bursts)
        replays = [await self._round("replay", number=number, rate_hz=rate_hz) for number in range(options.rounds)]
        brackets: dict[str, Bracket] = {}
        if options.goodput_trials:
            probes = read_records(alone["records"][reference])
            for name in options.goodput_of or options.sides:
                own_rps = median(capacity_rps(one.records[name]) for one in bursts)
                brackets[name] = await self._bisect(name, own_rps=own_rps, probes=probes)
        return {
            **asdict(options),
            "reference": reference,
            "rate_hz": rate_hz,
            "num_requests": options.count * options.rounds,
            "outputs": alone["outputs"],
            "is_void": any(one.is_void for one in (*bursts, *replays)),
            "foreign_cores": [one.foreign_cores for one in (*bursts, *replays)],
            **summarize_sides(
                options.sides,
                bursts=[one.records for one in bursts],
                replays=[one.records for one in replays],
                brackets=brackets,
            ),
        }

    async def _probe(self) -> dict[str, Any]:
        """Ask every side for the same few clips, one at a time, for their audio and for their time alone."""
        arrivals = self._choose_probes()
        clips: dict[str, list[Audio]] = {name: [] for name in self._askers}
        records: dict[str, list[Record]] = {name: [] for name in self._askers}
        with tqdm(total=2 * len(arrivals) * len(self._askers), desc="alone", leave=False, disable=None) as bar:
            for arrival in arrivals:
                for name, asker in self._askers.items():
                    with _failing(name):
                        clips[name].append((await asker.ask(arrival)).read())
                    bar.update()
            for arrival in arrivals:
                for name, asker in self._askers.items():
                    with _failing(name):
                        records[name] += await play(asker, [arrival])
                    bar.update()
        outputs = {}
        if self._options.largest_difference is not None:
            reference, *others = self._options.sides
            bound = self._options.largest_difference
            compared = compare(clips[reference], {name: clips[name] for name in others}, bound=bound)
            outputs = {name: asdict(comparison) for name, comparison in compared.items()}
        return {"outputs": outputs, "records": {name: write_records(own) for name, own in records.items()}}

    def _choose_probes(self) -> list[Arrival]:
        """Returns a few arrivals of each step class, spread over their durations, all due at once."""
        arrivals = self._draw(0, rate_hz=None, count=max(self._options.count, _LEAST_DRAWN))
        chosen = []
        for steps in arrivals.step_classes:
            own = sorted((a for a in arrivals if a.steps == steps), key=lambda a: a.duration_s)
            places = {round(i * (len(own) - 1) / (_PROBES_PER_CLASS - 1)) for i in range(_PROBES_PER_CLASS)}
            chosen += [own[place] for place in sorted(places)]
        return [replace(arrival, at_s=0.0) for arrival in chosen]

    async def _round(self, kind: str, *, number: int, rate_hz: float | None) -> Round:
        """One list to every side in turns; again while other programs use the machine."""
        arrivals = self._draw(number, rate_hz=rate_hz)
        arrivals.save(self._pieces.folder / f"{kind}-{number + 1}-arrivals.json")

        async def play_all() -> dict[str, list[dict[str, Any]]]:
            records = {name: await self._play(name, arrivals, what=f"{kind} {number + 1}") for name in self._askers}
            return {name: write_records(own) for name, own in records.items()}

        async def play_in_quiet() -> dict[str, Any]:
            records, watch = await wait_in_quiet(play_all) if self._is_watched else (await play_all(), Watch())
            if not watch.is_quiet:
                tqdm.write(f"{kind}-{number + 1}: void, others used {watch.foreign_cores:.2f} cores", file=sys.stderr)
            return {"records": records, "foreign_cores": watch.foreign_cores, "is_void": not watch.is_quiet}

        piece = await self._take(f"{kind}-{number + 1}", play_in_quiet)
        return Round(**{**piece, "records": {name: read_records(own) for name, own in piece["records"].items()}})

    async def _bisect(self, name: str, *, own_rps: float, probes: Sequence[Record]) -> Bracket:
        """The highest rate at which nearly all requests end in time, between shares of the side's own capacity."""
        good_rps, bad_rps = (share * own_rps for share in _GOODPUT_RANGE)
        alone_ms = fit_alone_ms(probes)
        for trial in range(self._options.goodput_trials):
            rate_hz = (good_rps + bad_rps) / 2
            arrivals = self._draw(trial, rate_hz=rate_hz)

            async def play_one(arrivals: ArrivalList = arrivals, trial: int = trial) -> list[dict[str, Any]]:
                return write_records(await self._play(name, arrivals, what=f"goodput {trial + 1}"))

            records = read_records(await self._take(f"goodput-{name}-{trial + 1}", play_one))
            if is_good(records, alone_ms=alone_ms):
                good_rps = rate_hz
            else:
                bad_rps = rate_hz
        return Bracket(good_rps, bad_rps)

    async def _play(self, name: str, arrivals: ArrivalList, *, what: str) -> list[Record]:
        with tqdm(total=len(arrivals), desc=f"{what} {name}", leave=False, disable=None) as bar, _failing(name):
            records = await play(self._askers[name], arrivals, on_end=bar.update)
            if all(record.refused for record in records):
                raise RuntimeError("it refused every request")
            return records

    async def _take(self, name: str, measure: Callable[[], Awaitable[Any]]) -> Any:
        if name in self._pieces:
            tqdm.write(f"{name}: kept from an earlier start", file=sys.stderr)

        async def measure_in_time() -> Any:
            if time.monotonic() >= self._ends_at:
                raise OutOfTimeError(f"out of time before {name}: the same command goes on from here")
            started_at = time.monotonic()
            value = await measure()
            tqdm.write(f"{name}: measured in {time.monotonic() - started_at:.0f} s", file=sys.stderr)
            return value

        return await self._pieces.take(name, measure=measure_in_time)

    def _draw(self, number: int, *, rate_hz: float | None, count: int | None = None) -> ArrivalList:
        options = self._options
        return draw_arrivals(
            options.mix,
            rate_hz=rate_hz,
            count=count or options.count,
            seed=number + 1,
            max_duration_s=options.max_duration_s,
        )


@contextmanager
def _failing(side: str) -> Iterator[None]:
    """Errors in it are those of one side: the first of them is told."""
    try:
        yield
    except Exception as error:
        first: BaseException = error
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        raise SideFailedError(f"{side} failed: {first or type(first).__name__}") from error
