"""The engine on a virtual clock: the real scheduler, batching, predictions and cost model, with formulas for an H200.

A denoiser call takes `fixed + max(F / flops, (W + A) / bandwidth) / efficiency`. F is the number of operations and A
the bytes of activations of all rows; W is the bytes of the weights. Decoding takes `fixed + D / flops / efficiency`
with D operations. A multiply-add counts as two operations. The constants fit Stability AI's published H200 times within
10 % (medium at 5 s: 37 % too high). The networks' dimensions are from the published configs.

Each iteration of the engine's loop does the same as in `engine.loop.EngineLoop`: one denoising step on the GPU's first
queue (CUDA stream), and on the second queue, the text encoding of new rows and the decoding of the next windows.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

from benchmarks.load import Record
from benchmarks.workload import Arrival
from stable_audio_serve.engine import EngineOptions
from stable_audio_serve.engine.build import build_scheduler
from stable_audio_serve.engine.calls.warmup import DURATION_SHARES, step_calls
from stable_audio_serve.engine.scheduling.batching import PackedGraphs
from stable_audio_serve.engine.scheduling.cost import CostModel, Measurement
from stable_audio_serve.engine.scheduling.prediction import Predictor
from stable_audio_serve.engine.scheduling.scheduler import Phase, RowId, RowWork
from stable_audio_serve.engine.scheduling.windows import num_in_turn
from stable_audio_serve.models.protocol import WindowRule
from stable_audio_serve.models.windows import cut_windows, window_lengths

_RATE_HZ, _HOP = 44_100, 4096
_LATENT_CHANNELS = 256
_CONTEXT_TOKENS = 257
_BYTES = 2  # bytes per value in half precision
_ACTIVATIONS = 40  # vectors of the layer's width that a layer reads or writes for each token
_PROBE_WINDOW = 128  # frames
_CALLS_AHEAD = 2  # number of calls that the host may enqueue before the GPU begins them, as in `engine.pacing`


@dataclass(frozen=True, slots=True)
class Network:
    """The work of a model's denoiser and decoder, counted from the shapes of the official networks.

    In each step, each token is multiplied by `layer_weights` weights of each layer: those of self-attention and its
    output, of cross-attention's queries and output, and of the feed-forward network. Differential attention has two
    softmaxes. `decode_operations` is for one latent frame. A decoded window has `halo_frames` more frames on each side.
    """

    num_weights: int
    width: int
    depth: int
    layer_weights: int
    softmaxes: int
    decode_operations: int
    halo_frames: int
    longest_s: float
    prefix_tokens: int = 64

    def frames(self, duration_s: float) -> int:
        """Returns the number of latent frames of a clip, rounded up to an even number."""
        return 2 * math.ceil(duration_s * _RATE_HZ / _HOP / 2)

    def step_operations(self, frames: int) -> float:
        """Returns the number of operations for one step of a row, without operations that a request needs only once."""
        tokens = frames + self.prefix_tokens
        layer = 2 * self.layer_weights * tokens + 4 * self.softmaxes * self.width * tokens * (tokens + _CONTEXT_TOKENS)
        return self.depth * layer + 4 * _LATENT_CHANNELS * self.width * frames

    def spare_operations(self, tokens: int) -> float:
        """Returns the number of operations for padding tokens of a packed batch, which have no attention."""
        return (2 * self.layer_weights * self.depth + 4 * _LATENT_CHANNELS * self.width) * tokens

    def step_bytes(self, frames: int) -> float:
        return _ACTIVATIONS * self.width * (frames + self.prefix_tokens) * self.depth * _BYTES


SMALL = Network(
    num_weights=457_986_048,
    width=1024,
    depth=20,
    layer_weights=18 * 1024**2,
    softmaxes=1,
    decode_operations=1_864_310_784,
    halo_frames=2,
    longest_s=120.0,
)
MEDIUM = Network(
    num_weights=1_451_397_120,
    width=1536,
    depth=24,
    layer_weights=21 * 1536**2,
    softmaxes=2,
    decode_operations=14_592_688_128,
    halo_frames=12,
    longest_s=380.0,
)


@dataclass(frozen=True, slots=True)
class Gpu:
    """An H200 GPU that runs one network in half precision with CUDA graphs. Times are in milliseconds."""

    network: Network
    flops: float = 790e12  # sustained
    bandwidth: float = 4.3e12  # bytes per second, sustained
    efficiency: float = 0.55
    fixed_ms: float = 1.4
    prompt_ms: float = 1.0

    def step_ms(self, lengths: Sequence[int], *, num_spare: int = 0) -> float:
        """Returns the time of one denoiser call for rows with these numbers of latent frames.

        `num_spare` is the number of padding tokens in the call.
        """
        net = self.network
        operations = sum(map(net.step_operations, lengths)) + net.spare_operations(num_spare)
        moved = net.num_weights * _BYTES + sum(map(net.step_bytes, lengths))
        moved += net.step_bytes(num_spare - net.prefix_tokens)
        device_ms = max(operations / self.flops, moved / self.bandwidth) / self.efficiency * 1000.0
        return self.fixed_ms + device_ms

    def decode_ms(self, windows: int, frames: int) -> float:
        operations = windows * frames * self.network.decode_operations
        return self.fixed_ms + operations / self.flops / self.efficiency * 1000.0


def work_of(arrival: Arrival, network: Network) -> RowWork:
    """Returns the device work of a request, with decoding in the engine's windows. Guidance takes two rows per step."""
    frames = network.frames(arrival.duration_s)
    windows = cut_windows(frames, rule=WindowRule(network.halo_frames))
    branches = [1 if arrival.cfg_scale == 1.0 else 2] * arrival.steps
    return RowWork(frames, branches=branches, decode_left=window_lengths(windows))


def record_of(arrival: Arrival, ended_ms: float) -> Record:
    """Returns the record of a request that finished at this time."""
    return Record(0, arrival.at_s, ended_ms / 1000.0, arrival.duration_s, arrival.steps)


@dataclass(slots=True)
class _QueuedCall:
    """A call in the GPU's second queue. Its end completes the audio of the requests in `arrivals`."""

    number: int
    left_ms: float
    arrivals: tuple[Arrival, ...]


class _Queues:
    """The two queues (CUDA streams) of a simulated GPU.

    Calls of the second queue have priority. The first queue gets the remaining time of the GPU.
    """

    def __init__(self) -> None:
        self.now_ms = 0.0
        self.num_enqueued = 0  # calls added to the second queue so far
        self.records: list[Record] = []
        self._second: deque[_QueuedCall] = deque()

    def run(self, ms: float) -> None:
        """Let the GPU finish all calls of the second queue, and then a call of the first queue that takes `ms`."""
        self.wait(self.num_enqueued)
        self.now_ms += ms

    def enqueue(self, ms: float, *arrivals: Arrival) -> int:
        """Add a call that takes `ms` to the second queue. Returns the call's number, for `wait`."""
        self.num_enqueued += 1
        self._second.append(_QueuedCall(self.num_enqueued, ms, arrivals))
        return self.num_enqueued

    def wait(self, number: int) -> None:
        """Advance the clock until call `number` of the second queue has ended."""
        while not self.has_ended(number):
            self.rest(self.now_ms + self._second[0].left_ms)

    def rest(self, until_ms: float) -> None:
        """Advance the clock to `until_ms` while the GPU works only on the second queue."""
        while self._second and self.now_ms + self._second[0].left_ms <= until_ms:
            call = self._second.popleft()
            self.now_ms += call.left_ms
            self.records += [record_of(arrival, self.now_ms) for arrival in call.arrivals]
        if self._second and until_ms > self.now_ms:
            self._second[0].left_ms -= until_ms - self.now_ms
        self.now_ms = max(self.now_ms, until_ms)

    def has_ended(self, number: int) -> bool:
        return not self._second or self._second[0].number > number


@dataclass(slots=True)
class _Row:
    arrival: Arrival
    work: RowWork
    has_started: bool = False
    text: int | None = None  # the row's first step must wait for this call of the second queue


class SimulatedEngine:
    """A simulation of one engine on one GPU. Call `run` only once."""

    def __init__(self, gpu: Gpu) -> None:
        network, options = gpu.network, EngineOptions(mode="fast")
        longest_frames = network.frames(network.longest_s)
        self._gpu = gpu
        self._together = options.slots
        self._cost = CostModel()
        self._policy = PackedGraphs(
            partial(self._cost.knee_tokens, fixed_share=options.fixed_share),
            network.prefix_tokens,
            longest_frames,
        )
        self._fit_cost(longest_frames, max_tokens=options.max_step_tokens)
        self._predictor = Predictor(self._cost, self._policy)
        self._scheduler = build_scheduler(options, self._policy, predictor=self._predictor, has_second_queue=True)
        self._queues = _Queues()
        self._rows: dict[RowId, _Row] = {}
        self._prompts: set[str] = set()
        self._last_text = 0
        self._windows: list[int] = []  # numbers of decode calls in the second queue

    def run(self, arrivals: Iterable[Arrival]) -> list[Record]:
        """Simulate all requests. Returns their records in order of completion. `arrivals` must be sorted by time."""
        queues, coming = self._queues, list(arrivals)
        num_taken = 0
        while num_taken < len(coming) or self._rows:
            if not self._rows:
                queues.rest(1000.0 * coming[num_taken].at_s)
            while num_taken < len(coming) and 1000.0 * coming[num_taken].at_s <= queues.now_ms:
                self._receive(RowId(num_taken), coming[num_taken])
                num_taken += 1
            self._turn()
        queues.wait(queues.num_enqueued)
        return queues.records

    def _fit_cost(self, longest_frames: int, *, max_tokens: int) -> None:
        """Fit the cost model to the simulated times of the call shapes that the engine's warm-up measures."""
        lengths = {max(int(longest_frames * share), 1) for share in DURATION_SHARES}
        calls = [call for frames in lengths for call in step_calls(self._policy, frames, max_tokens=max_tokens)]
        shapes = {group for call in calls for group in call.groups}
        windows = {min(frames, _PROBE_WINDOW) for frames in lengths}
        gpu = self._gpu
        self._cost.fit("text", [Measurement(count, 0, gpu.prompt_ms) for count in (1, 2, 4, 8)])
        self._cost.fit("denoise", [Measurement(rows, n, gpu.step_ms([n] * rows)) for rows, n in shapes])
        self._cost.fit("decode", [Measurement(1, frames, gpu.decode_ms(1, frames)) for frames in windows])

    def _receive(self, row_id: RowId, arrival: Arrival) -> None:
        work = work_of(arrival, self._gpu.network)
        self._rows[row_id] = _Row(arrival, work)
        alone_s = self._predictor.alone_ms(work) / 1000.0
        self._scheduler.add(row_id, work, arrived_at=arrival.at_s, alone_s=alone_s)

    def _turn(self) -> None:
        ids = self._scheduler.pick(use_second_queue=self._second_queue_has_room()) or self._scheduler.pick()
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
            self._queues.wait(self._queues.num_enqueued - _CALLS_AHEAD)
        for row_id in ids:
            if self._rows[row_id].work.phase is Phase.DONE:
                self._scheduler.remove(row_id)
                del self._rows[row_id]

    def _second_queue_has_room(self) -> bool:
        self._windows = [number for number in self._windows if not self._queues.has_ended(number)]
        return len(self._windows) <= _CALLS_AHEAD

    def _begin(self, rows: Sequence[_Row]) -> None:
        """Before a step of these rows, wait until the second queue has encoded their text."""
        for row in rows:
            if row.has_started and row.text is not None:
                self._queues.wait(row.text)
                row.text = None

    def _encode_prompts(self, rows: Sequence[_Row]) -> None:
        missing = {row.arrival.prompt for row in rows} - self._prompts
        for _ in range(0, len(missing), self._together):
            self._last_text = self._queues.enqueue(self._gpu.prompt_ms)
        self._prompts |= missing
        for row in rows:
            row.has_started = True
            row.text = self._last_text

    def _denoise(self, rows: Sequence[_Row]) -> None:
        calls = self._policy.split([row.work.lane for row in rows])
        ms = sum(
            self._gpu.step_ms(call.lengths or [call.frames] * call.rows, num_spare=call.num_spare) for call in calls
        )
        self._cost.correct("denoise", [call.groups for call in calls], measured_ms=ms)
        self._queues.run(ms)
        for row in rows:
            row.work.finish_evaluation()

    def _decode(self, rows: Sequence[_Row]) -> None:
        """Enqueue calls that decode the next windows of each row. Windows of equal length share a call."""
        lengths: list[int] = []
        for row in rows:
            left = row.work.decode_left
            num = num_in_turn(left)
            lengths += left[:num]
            row.work.decode_left = left[num:]
        ms = 0.0
        for frames, group in groupby(sorted(lengths)):
            windows = len(list(group))
            for start in range(0, windows, self._together):
                ms += self._gpu.decode_ms(min(windows - start, self._together), frames)
        ended = [row.arrival for row in rows if row.work.phase is Phase.DONE]
        self._windows.append(self._queues.enqueue(ms, *ended))
