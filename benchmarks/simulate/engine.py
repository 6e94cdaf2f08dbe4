"""The engine on a virtual clock: the product's own scheduler, batching, predictions and cost model; the device is a
formula. A turn is that of `engine.loop.EngineLoop`: text of rows that start, one evaluation, the next decode windows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby

from benchmarks.arrivals import Arrival
from benchmarks.simulate.devices import DeviceModel
from benchmarks.simulate.requests import Outcome, Shape
from stable_audio_serve.engine import EngineOptions
from stable_audio_serve.engine.batching import BatchPolicy, Call, MergedGrid, Packed
from stable_audio_serve.engine.cost import CostModel, Measurement
from stable_audio_serve.engine.pace import WindowPace
from stable_audio_serve.engine.prediction import Predictor
from stable_audio_serve.engine.scheduler import RowId, Scheduler, SchedulerLimits
from stable_audio_serve.engine.windows import count_fitting, window_lengths
from stable_audio_serve.engine.work import Phase, RowWork
from stable_audio_serve.models.windows import LONGEST_FRAMES, cut_windows

_PROBE_ROWS = (1, 2, 4)
_PROBE_SHARES = (1 / 64, 1 / 16, 1 / 4, 1.0)  # of the longest clip, as in engine.warmup
_PROBE_WINDOW = 128


@dataclass(slots=True)
class Counts:
    """What the turns were like: tokens are latent frames of network rows, `shapes` (rows, frames) of padded calls."""

    turns: int = 0
    calls: int = 0
    rows: int = 0
    tokens: int = 0
    padded_tokens: int = 0
    shapes: set[tuple[int, int]] = field(default_factory=set)


@dataclass(slots=True)
class _Row:
    arrival: Arrival
    work: RowWork
    has_started: bool = False
    frames_decoded: int = 0


class SimulatedEngine:
    """One engine in fast mode. Outcomes are in order of their ends; the clock goes on between two calls of `run`."""

    def __init__(
        self,
        device: DeviceModel,
        shape: Shape,
        *,
        longest_frames: int,
        options: EngineOptions = EngineOptions(mode="fast"),
        pack: Callable[[Sequence[tuple[int, int]]], float] | None = None,
    ) -> None:
        """`longest_frames`: latent frames of the model's longest clip. With `pack` rows are packed, and it prices a
        call by the (rows, frames) in it; without they share padded calls.
        """
        self._device = device
        self._shape = shape
        self._options = options
        self._pack = pack
        grid = 1 if pack else options.frame_grid or 64
        self._cost = fit_cost(device, longest_frames=longest_frames, grid=grid)
        self._policy = self._build_policy(grid)
        self._pace = WindowPace(self._cost, turn_frames=options.turn_frames, is_fixed=False)
        self._predictor = Predictor(self._cost, self._policy, turn_frames=options.turn_frames)
        limits = SchedulerLimits(
            max_started=options.max_rows,
            max_tokens=options.max_step_tokens,
            slack=options.slack,
            max_slack_s=options.max_slack_s,
            batch_share=options.batch_share,
        )
        self._scheduler = Scheduler(
            limits,
            knee_tokens=lambda frames: frames * self._policy.crowd(1, frames),
            step_ms=self._predictor.step_ms,
        )
        self._rows: dict[RowId, _Row] = {}
        self._prompts: set[str] = set()
        self._now = 0.0
        self.counts = Counts()

    def run(self, arrivals: Iterable[Arrival]) -> list[Outcome]:
        """Returns what became of the arrivals, which are due in this order, none before the end of the last call."""
        outcomes: list[Outcome] = []
        coming = list(arrivals)
        num_taken = 0
        while num_taken < len(coming) or self._rows:
            if not self._rows:
                self._now = max(self._now, coming[num_taken].at_s)
            while num_taken < len(coming) and coming[num_taken].at_s <= self._now:
                self._receive(RowId(num_taken), coming[num_taken])
                num_taken += 1
            outcomes += self._turn()
        return outcomes

    def _receive(self, row_id: RowId, arrival: Arrival) -> None:
        work = self._shape.work(arrival)
        self._rows[row_id] = _Row(arrival, work)
        alone_s = self._predictor.alone_ms(work) / 1000.0
        self._scheduler.add(row_id, work, arrived_at=arrival.at_s, alone_s=alone_s)

    def _turn(self) -> list[Outcome]:
        picked = {row_id: self._rows[row_id] for row_id in self._scheduler.pick()}
        phases = {row_id: row.work.phase for row_id, row in picked.items()}
        self._encode_prompts([row for row in picked.values() if not row.has_started])
        denoising = [row for row_id, row in picked.items() if phases[row_id] is Phase.DENOISE]
        if denoising:
            self._denoise(denoising)
        self._decode([row for row_id, row in picked.items() if phases[row_id] is Phase.DECODE])
        self.counts.turns += 1
        ended = [row_id for row_id, row in picked.items() if row.work.phase is Phase.DONE]
        for row_id in ended:
            self._scheduler.remove(row_id)
        return [Outcome(self._rows.pop(row_id).arrival, self._now) for row_id in ended]

    def _encode_prompts(self, rows: Sequence[_Row]) -> None:
        missing = list(dict.fromkeys(r.arrival.prompt for r in rows if r.arrival.prompt not in self._prompts))
        for start in range(0, len(missing), self._options.slots):
            self._take(self._device.text_ms(len(missing[start : start + self._options.slots])))
        self._prompts.update(missing)
        for row in rows:
            row.has_started = True

    def _denoise(self, rows: Sequence[_Row]) -> None:
        lanes = [row.work.lane for row in rows]
        self.counts.rows += len(rows)
        self.counts.tokens += sum(lane.branches * lane.frames for lane in lanes)
        calls = self._policy.split(lanes)
        ms = sum(map(self._call_ms, calls))
        self._cost.correct("denoise", [call.shape for call in calls], measured_ms=ms)
        self._pace.saw_step(ms)
        self._take(ms)
        self.counts.calls += len(calls)
        self.counts.padded_tokens += sum(sum(call.lengths) or call.rows * call.frames for call in calls)
        self.counts.shapes.update((call.rows, call.frames) for call in calls if not call.lengths)
        for row in rows:
            row.work.finish_evaluation()

    def _build_policy(self, grid: int) -> BatchPolicy:
        knee_tokens = partial(self._cost.knee_tokens, fixed_share=self._options.fixed_share)
        if self._pack:
            return Packed(knee_tokens)
        return MergedGrid(
            call_ms=lambda rows, frames: self._cost.call_ms("denoise", rows=rows, frames=frames),
            knee_tokens=knee_tokens,
            grid=grid,
        )

    def _call_ms(self, call: Call) -> float:
        if self._pack and call.lengths:
            return self._pack([(1, frames) for frames in call.lengths])
        return self._device.step_ms(call.rows, call.frames)

    def _decode(self, rows: Sequence[_Row]) -> None:
        """Each row's next windows; windows of one length share a call, as in `engine.executor`."""
        lengths: list[int] = []
        others_wait = any(row.work.phase is not Phase.DECODE for row in self._rows.values())
        most = self._pace.decode_frames(len(rows), others_wait=others_wait)
        for row in rows:
            self._cut(row, longest=min(most, LONGEST_FRAMES))
            left = row.work.decode_left
            num = count_fitting(left, most)
            lengths += left[:num]
            row.work.decode_left = left[num:]
        for frames, group in groupby(sorted(lengths)):
            windows = len(list(group))
            for start in range(0, windows, self._options.slots):
                self._take(self._device.decode_ms(min(windows - start, self._options.slots), frames))

    def _cut(self, row: _Row, *, longest: int) -> None:
        """Cut what is left of the row's clip anew, as `engine.windows.AudioAssembly`; the first window is taken."""
        if self._shape.rule is None:
            return
        frames = row.work.frames
        spans = cut_windows(row.frames_decoded, frames=frames, rule=self._shape.rule, longest=longest)
        row.work.decode_left = window_lengths(spans)
        row.frames_decoded = spans[0].keep_stop

    def _take(self, ms: float) -> None:
        self._now += ms / 1000.0


def fit_cost(device: DeviceModel, *, longest_frames: int, grid: int) -> CostModel:
    """A cost model that has seen what the warm-up measures."""
    cost = CostModel()
    lengths = sorted({grid * -(-int(longest_frames * share) // grid) or grid for share in _PROBE_SHARES})
    cost.fit("text", [Measurement(1, 0, device.text_ms(1))])
    cost.fit("denoise", [Measurement(n, frames, device.step_ms(n, frames)) for frames in lengths for n in _PROBE_ROWS])
    windows = sorted({min(frames, _PROBE_WINDOW) for frames in lengths})
    cost.fit("decode", [Measurement(1, frames, device.decode_ms(1, frames)) for frames in windows])
    return cost
