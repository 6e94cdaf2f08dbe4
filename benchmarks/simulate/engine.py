"""The engine on a virtual clock: the product's own scheduler, batching, predictions and cost model; the device is a
formula. A turn is that of `engine.loop.EngineLoop`: text of rows that start and the next decode windows, beside one
evaluation where the device has two queues.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from benchmarks.arrivals import Arrival
from benchmarks.simulate.devices import DeviceModel
from benchmarks.simulate.queues import Queues
from benchmarks.simulate.requests import Outcome, Shape
from stable_audio_serve.core.generation import Mode
from stable_audio_serve.engine import EngineOptions
from stable_audio_serve.engine.build import resolve_mode, resolve_policy
from stable_audio_serve.engine.calls.coding_calls import captured_prompts, captured_windows
from stable_audio_serve.engine.calls.warmup import DURATION_SHARES, step_shapes
from stable_audio_serve.engine.prediction import Predictor
from stable_audio_serve.engine.scheduling.batching import BatchPolicy, Call, OneRowPerCall
from stable_audio_serve.engine.scheduling.call_shapes import PackedShapes, round_up
from stable_audio_serve.engine.scheduling.cost import CostModel, Measurement
from stable_audio_serve.engine.scheduling.pacing import WindowPace
from stable_audio_serve.engine.scheduling.scheduler import RowId, Scheduler, SchedulerLimits
from stable_audio_serve.engine.scheduling.windows import count_fitting, window_lengths
from stable_audio_serve.engine.scheduling.work import Phase, RowWork
from stable_audio_serve.models.windows import LONGEST_FRAMES, WINDOW_GRID, cut_windows

_PROBE_WINDOW = 128
_CALLS_AHEAD = 2  # of the host, as in `engine.pacing`


@dataclass(frozen=True, slots=True)
class Kind:
    """What suits a kind of device, as in `engine.device`."""

    default_mode: Mode
    frame_grid: int
    shares_calls: bool
    prefers_packed: bool = False
    has_second_queue: bool = False


CPU = Kind("strict", frame_grid=1, shares_calls=False, prefers_packed=True)
GPU = Kind("fast", frame_grid=64, shares_calls=True, has_second_queue=True)


@dataclass(slots=True)
class Counts:
    """What the turns were like: tokens are latent frames of network rows; `shapes` of calls that a graph is captured
    of: (rows, frames) of padded ones, (rows, longest, tokens) of packed ones."""

    turns: int = 0
    calls: int = 0
    rows: int = 0
    tokens: int = 0
    padded_tokens: int = 0
    shapes: set[tuple[int, ...]] = field(default_factory=set)
    text_shapes: set[int] = field(default_factory=set)  # prompts
    decode_shapes: set[tuple[int, int]] = field(default_factory=set)  # (windows, frames)


@dataclass(slots=True)
class _Row:
    arrival: Arrival
    work: RowWork
    has_started: bool = False
    text: int | None = None  # the second queue's call that its first step waits for
    frames_decoded: int = 0


class SimulatedEngine:
    """One engine. Outcomes are in order of their ends; the clock goes on between two calls of `run`."""

    def __init__(
        self,
        device: DeviceModel,
        shape: Shape,
        *,
        longest_frames: int,
        options: EngineOptions = EngineOptions(mode="fast"),
        kind: Kind = GPU,
        pack: Callable[[Call], float] | None = None,
        prefix_tokens: int = 0,
        gap_ms: float = 0.0,
    ) -> None:
        """`longest_frames`: latent frames of the model's longest clip. With `pack`, which prices packed calls, rows may
        be packed, with `prefix_tokens` tokens before each row's frames; without they share padded calls. `gap_ms`: of
        each step, for which windows beside it have the device as well; without, they take of a step's time what they
        take alone.
        """
        self._gap_ms = gap_ms
        self._device = device
        self._shape = shape
        self._pack = pack
        is_strict = resolve_mode(options, kind) == "strict"
        self._together = 1 if is_strict else options.slots
        self._cost = CostModel()
        self._policy: BatchPolicy = resolve_policy(
            options,
            kind,
            cost=self._cost,
            packs_rows=pack is not None,
            packed=PackedShapes(prefix_tokens, longest_frames) if pack else None,
        )
        self._pace = WindowPace(self._cost, turn_frames=options.turn_frames, is_fixed=is_strict)
        limits = SchedulerLimits(
            max_started=options.max_rows,
            max_tokens=0 if isinstance(self._policy, OneRowPerCall) else options.max_step_tokens,
            slack=options.slack,
            max_slack_s=options.max_slack_s,
            batch_share=options.batch_share,
        )
        fit_cost(self._cost, device, policy=self._policy, longest_frames=longest_frames, limits=limits)
        self._predictor = Predictor(self._cost, self._policy, turn_frames=self._pace.turn_frames)
        self._scheduler = Scheduler(
            limits,
            knee_tokens=lambda frames: frames * self._policy.typical_rows(1, frames),
            step_ms=self._predictor.step_ms,
            has_second_queue=kind.has_second_queue,
        )
        self._has_second_queue = kind.has_second_queue
        self._queues: Queues[Arrival] = Queues()
        self._rows: dict[RowId, _Row] = {}
        self._prompts: set[str] = set()
        self._last_text = 0
        self._windows: list[int] = []  # the second queue's calls
        self.counts = Counts()

    def run(self, arrivals: Iterable[Arrival]) -> list[Outcome]:
        """Returns what became of the arrivals, which are due in this order, none before the end of the last call."""
        queues, coming = self._queues, list(arrivals)
        num_taken = 0
        while num_taken < len(coming) or self._rows:
            if not self._rows:
                queues.rest(1000.0 * coming[num_taken].at_s)
            while num_taken < len(coming) and 1000.0 * coming[num_taken].at_s <= queues.now_ms:
                self._receive(RowId(num_taken), coming[num_taken])
                num_taken += 1
            self._turn()
        queues.wait(queues.num_asked)
        outcomes = [Outcome(arrival, ended_ms / 1000.0) for arrival, ended_ms in queues.ended]
        queues.ended.clear()
        return outcomes

    def _receive(self, row_id: RowId, arrival: Arrival) -> None:
        work = self._shape.work(arrival)
        self._rows[row_id] = _Row(arrival, work)
        alone_s = self._predictor.alone_ms(work) / 1000.0
        self._scheduler.add(row_id, work, arrived_at=arrival.at_s, alone_s=alone_s)

    def _turn(self) -> None:
        ids = self._scheduler.pick(beside=self._has_room_beside()) or self._scheduler.pick()
        picked = [self._rows[row_id] for row_id in ids]
        denoising = [row for row in picked if row.work.phase is Phase.DENOISE]
        decoding = [row for row in picked if row.work.phase is Phase.DECODE]
        self._begin(denoising)
        self._encode_prompts([row for row in picked if not row.has_started])
        if decoding:
            self._decode(decoding)
        if all(row.text is not None for row in denoising) or self._queues.has_ended(self._last_text):
            self._begin(denoising)
        stepping = [row for row in denoising if row.text is None]
        if stepping:
            self._denoise(stepping)
        else:
            self._queues.wait(self._queues.num_asked - _CALLS_AHEAD)
        self.counts.turns += 1
        for row_id in ids:
            if self._rows[row_id].work.phase is Phase.DONE:
                self._scheduler.remove(row_id)
                del self._rows[row_id]

    def _has_room_beside(self) -> bool:
        self._windows = [number for number in self._windows if not self._queues.has_ended(number)]
        return len(self._windows) <= _CALLS_AHEAD

    def _begin(self, rows: Sequence[_Row]) -> None:
        """Let the next step wait for the text of these rows, where it was asked for."""
        for row in rows:
            if row.has_started and row.text is not None:
                self._queues.wait(row.text)
                row.text = None

    def _encode_prompts(self, rows: Sequence[_Row]) -> None:
        missing = list(dict.fromkeys(r.arrival.prompt for r in rows if r.arrival.prompt not in self._prompts))
        for start in range(0, len(missing), self._together):
            num_prompts = len(missing[start : start + self._together])
            self._last_text = self._ask(self._device.text_ms(num_prompts))
            self.counts.text_shapes.add(captured_prompts(num_prompts))
        self._prompts.update(missing)
        for row in rows:
            row.has_started = True
            row.text = self._last_text

    def _denoise(self, rows: Sequence[_Row]) -> None:
        lanes = [row.work.lane for row in rows]
        self.counts.rows += len(rows)
        self.counts.tokens += sum(lane.branches * lane.frames for lane in lanes)
        calls = self._policy.split(lanes)
        ms = sum(map(self._call_ms, calls))
        groups = [call.groups for call in calls]
        self._cost.correct("denoise", groups, measured_ms=ms)
        self._pace.record_step(sum(self._cost.groups_ms("denoise", own) for own in groups))
        self._queues.run(ms, gap_ms=self._gap_ms)
        self.counts.calls += len(calls)
        self.counts.padded_tokens += sum(
            sum(call.lengths) + call.num_spare if call.lengths else call.rows * call.frames for call in calls
        )
        self.counts.shapes.update(
            (call.rows, call.frames, *((call.room.tokens,) if call.room else ()))
            for call in calls
            if call.room or not call.lengths
        )
        for row in rows:
            row.work.finish_evaluation()

    def _call_ms(self, call: Call) -> float:
        if self._pack and call.lengths:
            return self._pack(call)
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
        ms = 0.0
        for frames, group in groupby(sorted(lengths)):
            windows = len(list(group))
            for start in range(0, windows, self._together):
                num_windows = min(windows - start, self._together)
                ms += self._device.decode_ms(num_windows, frames)
                self._count_windows(num_windows, frames)
        ended = [row.arrival for row in rows if row.work.phase is Phase.DONE]
        self._windows.append(self._ask(ms, *ended))

    def _count_windows(self, num_windows: int, frames: int) -> None:
        """Count a call as if clips had the headroom into which the product lengthens a last window."""
        padded = round_up(frames, WINDOW_GRID)
        if captured := captured_windows(num_windows, frames=padded):
            self.counts.decode_shapes.add((captured, padded))

    def _cut(self, row: _Row, *, longest: int) -> None:
        """Cut what is left of the row's clip anew, as `engine.windows.AudioAssembly`; the first window is taken."""
        if self._shape.rule is None or self._pace.is_fixed:
            return
        frames = row.work.frames
        spans = cut_windows(row.frames_decoded, frames=frames, rule=self._shape.rule, longest=longest)
        row.work.decode_left = window_lengths(spans)
        row.frames_decoded = spans[0].keep_stop

    def _ask(self, ms: float, *ended: Arrival) -> int:
        """Ask for work beside the next step, or before it where the device has one queue. Returns its number."""
        number = self._queues.ask(ms, *ended)
        if not self._has_second_queue:
            self._queues.wait(number)
        return number


def fit_cost(
    cost: CostModel, device: DeviceModel, *, policy: BatchPolicy, longest_frames: int, limits: SchedulerLimits
) -> None:
    """Fit `cost`, which `policy` reads, to what the warm-up measures."""
    lengths = {max(int(longest_frames * share), 1) for share in DURATION_SHARES}
    shapes = {shape for frames in lengths for shape in step_shapes(policy, frames, max_tokens=limits.max_tokens)}
    windows = {min(frames, _PROBE_WINDOW) for frames in lengths}
    cost.fit("text", [Measurement(n, 0, device.text_ms(n)) for n in (1, 2, 4, 8)])
    cost.fit("denoise", [Measurement(n, frames, device.step_ms(n, frames)) for n, frames in shapes])
    cost.fit("decode", [Measurement(1, frames, device.decode_ms(1, frames)) for frames in windows])
