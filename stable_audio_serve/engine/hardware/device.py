"""Everything that differs between CPU and CUDA: asynchronous copies, events, graph capture, and which mode is faster.
The rest of the engine never checks the kind of device.

The host queues work on the device, which runs it later. If the host waited for each result, the device would be idle
until the host queues more work. Results are therefore copied to pinned memory in the background. The host reads a
result when the device has reached the event that follows the copy (a `Moment`).

A device may have a second queue (on CUDA, a second stream) that runs in parallel with the first. This module ensures
that no queue reuses memory that the other queue still reads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stable_audio_serve.core.clock import Clock
from stable_audio_serve.core.generation import DeviceUse, Mode
from stable_audio_serve.engine.hardware.share import WHOLE, DeviceMemory, allowed_bytes
from stable_audio_serve.engine.options import Features
from stable_audio_serve.sampling.transfer import to_device

_CLOCK_HZ = 1.8e9  # about that of a data-centre GPU
_DOWNLOAD_BYTES = 64 * 2**20  # enough for three decoded windows of stereo audio of the greatest length
_PIECES = 4  # a tensor is copied in pieces of at most 1/4 of the ring, so that some arrive while others are collected
_ALIGNMENT = 64
_HOST_FACTS = Path("/proc/meminfo")


class DeviceLostError(Exception):
    """The device can no longer be used by this process. The process must be replaced."""


class Moment:
    """A point in a device's queue, such as a CUDA event. This one was reached when it was made, at `at_s`."""

    def __init__(self, at_s: float) -> None:
        self.at_s = at_s

    def is_reached(self) -> bool:
        """Whether the device has finished all work that was queued before this point."""
        return True

    def wait(self) -> None:
        """Block until the device has finished all work that was queued before this point."""

    def ms_since(self, earlier: Moment) -> float:
        """Return the device time in ms from `earlier` to this point. Both must be in the same queue and be reached."""
        return (self.at_s - earlier.at_s) * 1000.0


class Device:
    """A device as the engine thread uses it. The work of this one is finished when a call returns: it is a CPU, or is
    treated like one.
    """

    is_proved = True  # whether the device needs no check of speed features at start, because it has none
    can_capture = False
    survives_failed_capture = True  # if False, the process must be replaced after a capture has failed
    has_second_queue = False  # if False, work queued within `on_second_queue` goes to the only queue

    def __init__(self, device: torch.device, *, clock: Clock) -> None:
        is_cpu = device.type == "cpu"
        self.torch_device = device
        self.default_mode: Mode = "strict" if is_cpu else "fast"  # on a CPU, large batches save little time
        self.frame_grid = 1 if is_cpu else 64  # clips are best padded to a multiple of this many latent frames
        # Whether clips share a call whose batch size is fixed in strict mode. If not, fast mode concatenates clips of
        # different lengths, which is faster than padding them.
        self.shares_calls = not is_cpu
        self._clock = clock

    def upload(self, host: Tensor) -> Tensor:
        """Return a copy of a host tensor on the device. Does not wait for the copy to finish."""
        return to_device(host, self.torch_device)

    def host_buffer(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Return uninitialised host memory that asynchronous copies can read (pinned on CUDA)."""
        return torch.empty(shape, dtype=dtype)

    def download(self, source: Tensor, target: Tensor) -> None:
        """Start copying a device tensor to the contiguous host tensor `target`, which a later `collect` fills."""
        target.copy_(source)

    def collect(self) -> None:
        """Fill the `target` of every `download` that has finished."""

    def mark(self) -> Moment:
        """Return the point after all work that is queued so far. Within `on_second_queue`, this point also comes after
        all work that was in the first queue when the context was entered.
        """
        return Moment(self._clock.monotonic())

    def occupy(self, time_s: float) -> None:
        """Keep the queue busy for about this time. Work that the host queues meanwhile then runs without waiting for
        the host.
        """

    def on_second_queue(self, *reads: Tensor) -> AbstractContextManager[None]:
        """Return a context manager within which device work goes to the second queue, if there is one.

        The second queue starts this work when all earlier work of both queues is done, and runs it in parallel with
        later work of the first queue. The first queue may use the results only after `follow`.

        `reads` are tensors from the first queue that the second queue reads. Their memory is not reused until the
        second queue has finished this work.
        """
        return nullcontext()

    def follow(self, moment: Moment) -> None:
        """Make all work that is queued later wait for `moment`, a point in the second queue. Does not block the
        host.
        """

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """Capture the device work of `run` as a CUDA graph. Returns a function that replays the graph.

        `run` is called at least once and must only queue device work. Requires `can_capture`. A graph captured within
        `on_second_queue` must also be replayed within `on_second_queue`, because all graphs of a queue share memory.
        Raises RuntimeError if the work cannot be captured; the device stays usable.
        """
        raise RuntimeError("this device captures nothing")

    def require_usable(self, error: Exception) -> None:
        """Raise DeviceLostError if `error` is one, or if it has made the device unusable.

        If the error comes from the device, wait for all queued work: only a lost device then raises again. After a
        launch that failed, the device is still usable.
        """
        if isinstance(error, DeviceLostError):
            raise error
        if not isinstance(error, torch.AcceleratorError):
            return
        try:
            torch.accelerator.synchronize(self.torch_device)
        except torch.AcceleratorError as again:  # the error of a lost device comes back with every call
            raise DeviceLostError(f"the device {self.torch_device} is lost: {error}") from again

    def restricted(self, features: Features) -> Device:
        """Return a `Device` for the same hardware that uses only these features."""
        return self

    def use(self) -> DeviceUse:
        """Return the kind of device and, if known, how many bytes of its memory are in use."""
        return DeviceUse(self.torch_device.type)

    def memory(self) -> DeviceMemory | None:
        """Return how much of the device's memory is free and in use; None if the device shares the host's memory."""
        return None


@dataclass(slots=True)
class _Download:
    start: int
    staged: Tensor
    target: Tensor
    arrived: Moment
    is_done: bool = False


class DownloadRing:
    """A ring buffer of pinned memory through which tensors are copied to the host, and from there to ordinary memory.
    Used by one thread.

    The results have no pinned memory of their own, because the device would wait for each allocation, and the memory
    would be in use until the response is sent. Torch also never frees pinned memory, and rounds its size up to a power
    of two.
    """

    def __init__(self, make: Callable[[int], Tensor], *, mark: Callable[[], Moment], num_bytes: int) -> None:
        """`make(count)` allocates `count` bytes of pinned memory (uint8). It is called once, by the first `add`."""
        self._make = make
        self._mark = mark
        self._num_bytes = num_bytes
        self._memory: Tensor | None = None
        self._pending: deque[_Download] = deque()
        self._next = 0

    def add(self, source: Tensor, target: Tensor) -> None:
        """Start copying `source` to the contiguous host tensor `target`, which a later `collect` fills.

        Waits for earlier copies if the ring is full.
        """
        if self._memory is None:
            self._memory = self._make(self._num_bytes)
        longest = max(self._num_bytes // _PIECES // source.element_size(), 1)
        flat, into = source.contiguous().view(-1), target.view(-1)
        for begin in range(0, len(flat), longest):
            piece = flat[begin : begin + longest]
            start = self._place(piece.nbytes)
            staged = self._memory[start : start + piece.nbytes].view(piece.dtype)
            staged.copy_(piece, non_blocking=True)
            self._pending.append(_Download(start, staged, into[begin : begin + longest], self._mark()))
            self._next = start + -(-piece.nbytes // _ALIGNMENT) * _ALIGNMENT

    def collect(self) -> None:
        """Copy all data that has arrived in the ring to the host tensors."""
        for download in self._pending:
            if not download.is_done and download.arrived.is_reached():
                download.target.copy_(download.staged)
                download.is_done = True
        while self._pending and self._pending[0].is_done:
            self._pending.popleft()

    def _place(self, num_bytes: int) -> int:
        """Return the offset of `num_bytes` adjacent free bytes in the ring. Waits for earlier copies if necessary."""
        while True:
            if not self._pending:
                return 0
            taken = self._pending[0].start
            if self._next <= taken:  # the used part wraps around the end of the ring
                if num_bytes <= taken - self._next:
                    return self._next
            elif num_bytes <= self._num_bytes - self._next:
                return self._next
            elif num_bytes <= taken:
                return 0
            self._pending[0].arrived.wait()
            self.collect()


class CudaDevice(Device):
    """A CUDA GPU. Work is asynchronous. The second queue is a second stream. Calls can be captured as CUDA graphs."""

    default_mode: Mode = "fast"
    frame_grid = 64
    shares_calls = True
    is_proved = False
    # Before torch 2.13 a failed capture leaves its memory pool in the allocator (pytorch issue 180395): later blocks
    # leak, and calls of the two streams may share memory.
    survives_failed_capture = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)

    def __init__(self, device: torch.device, *, share: float = WHOLE, features: Features = Features()) -> None:
        """`share`, 0..1, is the fraction of device memory that this process may use, CUDA graphs included."""
        self.torch_device = device
        self.can_capture = features.captures
        self.has_second_queue = features.second_queue
        self._share = share
        if share < WHOLE:  # the engine plans for this limit; torch enforces it, in case a prediction was wrong
            total = torch.cuda.mem_get_info(device)[1]
            torch.cuda.set_per_process_memory_fraction(allowed_bytes(total, share=share) / total, device)
        pinned = partial(self.host_buffer, dtype=torch.uint8)
        self._downloads = DownloadRing(pinned, mark=self.mark, num_bytes=_DOWNLOAD_BYTES)
        # Key: the stream that replays the graphs. Value: the stream on which they are captured, and their memory pool.
        self._captures: dict[torch.cuda.Stream, tuple[torch.cuda.Stream, Any]] = {}
        self._kept: list[torch.cuda.CUDAGraph] = []

    @cached_property
    def _second(self) -> torch.cuda.Stream:
        # High priority, because work on this stream is short, and clips that are being decoded are almost finished.
        # Denoising steps, on the other stream, use the rest of the GPU.
        return torch.cuda.Stream(self.torch_device, priority=-1)

    def host_buffer(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def download(self, source: Tensor, target: Tensor) -> None:
        self._downloads.add(source, target)

    def collect(self) -> None:
        self._downloads.collect()

    def mark(self) -> Moment:
        return _Event(self.torch_device)

    def occupy(self, time_s: float) -> None:
        torch.cuda._sleep(int(time_s * _CLOCK_HZ))  # torch's own tests use it, too

    @contextmanager
    def on_second_queue(self, *reads: Tensor) -> Iterator[None]:
        if not self.has_second_queue:
            yield
            return
        # Without this wait, the second stream could also overwrite memory that the first stream has yet to read.
        self._second.wait_stream(torch.cuda.current_stream(self.torch_device))
        for tensor in reads:
            tensor.record_stream(self._second)
        with torch.cuda.stream(self._second):
            yield

    def follow(self, moment: Moment) -> None:
        assert isinstance(moment, _Event)
        moment.hold(torch.cuda.current_stream(self.torch_device))

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        current = torch.cuda.current_stream(self.torch_device)
        # The CUDA graphs of a stream share one memory pool, because they never run at the same time.
        if current not in self._captures:
            # A graph's kernels run at the priority of the stream that recorded them.
            self._captures[current] = stream, pool = (
                torch.cuda.Stream(self.torch_device, priority=current.priority),
                torch.cuda.graph_pool_handle(),
            )
            with torch.cuda.stream(stream):  # cuBLAS allocates a workspace for each stream, once
                torch.mm(*torch.zeros(2, 8, 8, device=self.torch_device))
            # Keep one small graph forever, because torch does not accept a memory pool again after its last graph is
            # deleted.
            self._kept.append(self._record(lambda: torch.zeros(1, device=self.torch_device), stream=stream, pool=pool))
        stream, pool = self._captures[current]
        # Run once before the capture, so that one-time initialisation is not captured. This uses the current stream,
        # because temporary tensors of another stream would take additional memory.
        run()
        stream.wait_stream(current)
        return self._record(run, stream=stream, pool=pool).replay

    def _record(self, run: Callable[[], object], *, stream: torch.cuda.Stream, pool: Any) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        try:
            # Not `torch.cuda.graph`, which waits for the device and frees unused memory first. In "thread_local" mode,
            # other threads may use the device during the capture, and their work is not captured.
            with torch.cuda.stream(stream):
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                try:
                    run()
                finally:
                    graph.capture_end()
        except torch.AcceleratorError as error:
            self.require_usable(error)
            raise RuntimeError(f"this work cannot be captured: {error}") from error
        return graph

    def restricted(self, features: Features) -> Device:
        return CudaDevice(self.torch_device, share=self._share, features=features)

    def use(self) -> DeviceUse:
        device = self.torch_device
        return DeviceUse("cuda", torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device))

    def memory(self) -> DeviceMemory | None:
        free, total = free_and_total(self.torch_device)
        allowed = allowed_bytes(total, share=self._share)
        return DeviceMemory(total, allowed, held=torch.cuda.memory_reserved(self.torch_device), free=free)


def free_and_total(device: torch.device | int, *, host_facts: Path = _HOST_FACTS) -> tuple[int, int]:
    """Return how many bytes of a GPU's memory are free, and how many there are.

    An integrated GPU, such as that of a DGX Spark, uses the host's memory. CUDA counts Linux's cache of files as used,
    but Linux drops it when memory is needed, so it counts as free here.
    """
    free, total = torch.cuda.mem_get_info(device)
    if torch.version.cuda and torch.cuda.get_device_properties(device).is_integrated:
        facts = dict(line.split(":") for line in host_facts.read_text().splitlines())
        free = max(free, int(facts["MemAvailable"].split()[0]) * 1024)
    return free, total


class _Event(Moment):
    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event(enable_timing=True)
        self._event.record(torch.cuda.current_stream(device))

    def is_reached(self) -> bool:
        return self._event.query()

    def wait(self) -> None:
        self._event.synchronize()

    def hold(self, stream: torch.cuda.Stream) -> None:
        """Make all work that is queued on `stream` later wait until this point is reached."""
        stream.wait_event(self._event)

    def ms_since(self, earlier: Moment) -> float:
        assert isinstance(earlier, _Event)
        return float(earlier._event.elapsed_time(self._event))


def open_device(device: torch.device, *, clock: Clock, share: float = WHOLE) -> Device:
    """Return the `Device` for a torch device. `share`, 0..1, is the fraction of a GPU's memory for this process."""
    return CudaDevice(device, share=share) if device.type == "cuda" else Device(device, clock=clock)
