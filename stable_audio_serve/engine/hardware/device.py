"""All that differs by kind of device: memory that copies need not wait for, points in the device's work, what suits it.
Nothing else in the engine asks which kind it runs on. Knows no rows and no model.

A device works through its queue behind the host. A host that waits for it leaves it idle afterwards, so results come
back by copies into pinned memory, and are collected once the `Moment` marked after them is reached. A device may have a
second queue, whose work runs beside that of the first; the rules that keep both from each other's memory are in here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property, partial
from typing import Any, Protocol

import torch
from torch import Tensor

from stable_audio_serve.core.clock import Clock
from stable_audio_serve.core.generation import DeviceUse, Mode
from stable_audio_serve.engine.hardware.landing import LandingRing
from stable_audio_serve.engine.hardware.share import WHOLE, DeviceMemory, allowed_bytes
from stable_audio_serve.sampling.transfer import to_device

# Errors after which the device itself is unusable: no row caused them and the process must be replaced.
DEVICE_LOST: tuple[type[Exception], ...] = (torch.AcceleratorError,) if hasattr(torch, "AcceleratorError") else ()

_LANDING_BYTES = 64 * 2**20  # three of the longest windows of stereo audio


class Moment(Protocol):
    """A point in a device's work."""

    def is_reached(self) -> bool:
        """Whether the device has done everything that was asked of it before."""
        ...

    def wait(self) -> None:
        """Block until the point is reached."""
        ...

    def ms_since(self, earlier: Moment) -> float:
        """Returns the device's time between two points of the same queue, both reached."""
        ...


class Device(Protocol):
    """One device as the engine thread uses it."""

    torch_device: torch.device
    default_mode: Mode
    frame_grid: int  # latent frames: what row lengths are best padded to a multiple of
    can_capture: bool
    has_second_queue: bool  # else what is asked for `beside` runs in order with everything else
    prefers_packed: bool  # rows of unlike lengths: packed rather than padded
    shares_calls: bool  # in strict mode: whether several rows fit into one call of fixed shape

    def upload(self, host: Tensor) -> Tensor:
        """Returns a host tensor's values on the device; does not wait."""
        ...

    def host_buffer(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Returns host memory that copies need not wait for; what it holds is left over from others."""
        ...

    def download(self, source: Tensor, target: Tensor) -> None:
        """Copy a device tensor to contiguous host memory of any kind; there once it is collected at a later moment."""
        ...

    def collect(self) -> None:
        """Bring everything to its memory that was downloaded before the last moment that is reached."""
        ...

    def mark(self) -> Moment:
        """Returns the point after everything that was asked of the device so far, within `beside` of both queues."""
        ...

    def beside(self, *reads: Tensor) -> AbstractContextManager[None]:
        """Returns a context in which work goes to the second queue, where there is one.

        It begins after everything that was asked for before, and runs beside what the first queue is asked for later.
        So what it makes may be used by the first queue only behind a `follow`. `reads` are the tensors of the first
        queue that it uses: their memory is nobody else's before that work is done.
        """
        ...

    def follow(self, moment: Moment) -> None:
        """Let what is asked for from now on begin after that point of the second queue; the host does not wait."""
        ...

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """Returns a function that asks the device for the same work again, on the same memory, in a single launch.

        `run` must ask for nothing but device work, and is carried out once or more. Only where `can_capture`. What is
        captured within `beside` must be asked for within it only: what one queue captures shares memory. Raises
        RuntimeError for work that cannot be captured; the device can be used afterwards.
        """
        ...

    def use(self) -> DeviceUse:
        """Returns the kind of device and its memory in bytes, where that is known."""
        ...

    def memory(self) -> DeviceMemory | None:
        """Returns how its own memory is divided now; None if it has none of its own."""
        ...


class WaitingDevice:
    """A device for which the host waits: a CPU, or one that has no queue to look into."""

    def __init__(self, device: torch.device, *, clock: Clock) -> None:
        is_cpu = device.type == "cpu"
        self.torch_device = device
        self.default_mode: Mode = "strict" if is_cpu else "fast"  # batching gains little on a CPU
        self.frame_grid = 1 if is_cpu else 64
        self.shares_calls = not is_cpu
        self.can_capture = False
        self.has_second_queue = False
        self.prefers_packed = is_cpu
        self._clock = clock

    def upload(self, host: Tensor) -> Tensor:
        return to_device(host, self.torch_device)

    def host_buffer(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    def download(self, source: Tensor, target: Tensor) -> None:
        target.copy_(source)

    def collect(self) -> None:
        """Everything is there."""

    def mark(self) -> Moment:
        return _Reached(self._clock.monotonic())

    def beside(self, *reads: Tensor) -> AbstractContextManager[None]:
        return nullcontext()

    def follow(self, moment: Moment) -> None:
        """Everything is done as soon as it is asked for."""

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("this device captures nothing")

    def use(self) -> DeviceUse:
        return DeviceUse(self.torch_device.type)

    def memory(self) -> DeviceMemory | None:
        return None


class _Reached:
    def __init__(self, at_s: float) -> None:
        self.at_s = at_s

    def is_reached(self) -> bool:
        return True

    def wait(self) -> None:
        """Nothing to wait for."""

    def ms_since(self, earlier: Moment) -> float:
        assert isinstance(earlier, _Reached)
        return (self.at_s - earlier.at_s) * 1000.0


class CudaDevice:
    """A GPU."""

    default_mode: Mode = "fast"
    frame_grid = 64
    shares_calls = True
    can_capture = True
    has_second_queue = True
    prefers_packed = False

    def __init__(self, device: torch.device, *, share: float = WHOLE) -> None:
        """`share` of its memory, 0..1, is the most that this process's tensors, captured calls included, can take."""
        self.torch_device = device
        self._share = share
        if share < WHOLE:  # the allocator fails above it, whatever the engine's own arithmetic says
            total = torch.cuda.mem_get_info(device)[1]
            torch.cuda.set_per_process_memory_fraction(allowed_bytes(total, share=share) / total, device)
        pinned = partial(self.host_buffer, dtype=torch.uint8)
        self._landing = LandingRing(pinned, mark=self.mark, num_bytes=_LANDING_BYTES)
        self._captures: dict[torch.cuda.Stream, tuple[torch.cuda.Stream, Any]] = {}  # by the queue that asks for them
        self._kept: list[torch.cuda.CUDAGraph] = []

    @cached_property
    def _second(self) -> torch.cuda.Stream:
        # It goes first: its pieces are short, and what it decodes is nearest to its end. Steps fill what is left.
        return torch.cuda.Stream(self.torch_device, priority=-1)

    def upload(self, host: Tensor) -> Tensor:
        return to_device(host, self.torch_device)

    def host_buffer(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def download(self, source: Tensor, target: Tensor) -> None:
        self._landing.land(source, target)

    def collect(self) -> None:
        self._landing.collect()

    def mark(self) -> Moment:
        return _Event(self.torch_device)

    @contextmanager
    def beside(self, *reads: Tensor) -> Iterator[None]:
        # The wait also protects memory that the second queue's work takes again after the first queue has read it.
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
        if current not in self._captures:  # one pool for all of a queue: no two of them run at once
            self._captures[current] = stream, pool = (
                torch.cuda.Stream(self.torch_device),
                torch.cuda.graph_pool_handle(),
            )
            # A pool whose last graph is dropped cannot be used again.
            self._kept.append(self._record(lambda: torch.zeros(1, device=self.torch_device), stream=stream, pool=pool))
        stream, pool = self._captures[current]
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            run()  # what happens once in a process's life must not happen within the capture
        current.wait_stream(stream)
        return self._record(run, stream=stream, pool=pool).replay

    def _record(self, run: Callable[[], object], *, stream: torch.cuda.Stream, pool: Any) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        try:
            # Not `torch.cuda.graph`, which waits for the device and gives unused memory back. What other threads ask
            # of the device meanwhile belongs to them: it neither fails nor is captured.
            with torch.cuda.stream(stream):
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                try:
                    run()
                finally:
                    graph.capture_end()
        except DEVICE_LOST as error:
            torch.cuda.synchronize(self.torch_device)  # raises if the device is lost indeed
            # Some versions of torch go on taking the pool for one that is being captured to, and refuse it.
            self._captures = {queue: own for queue, own in self._captures.items() if own[1] != pool}
            raise RuntimeError(f"this work cannot be captured: {error}") from error
        return graph

    def use(self) -> DeviceUse:
        device = self.torch_device
        return DeviceUse("cuda", torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device))

    def memory(self) -> DeviceMemory | None:
        free, total = torch.cuda.mem_get_info(self.torch_device)
        allowed = allowed_bytes(total, share=self._share)
        return DeviceMemory(total, allowed, held=torch.cuda.memory_reserved(self.torch_device), free=free)


class _Event:
    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event(enable_timing=True)
        self._event.record(torch.cuda.current_stream(device))

    def is_reached(self) -> bool:
        return self._event.query()

    def wait(self) -> None:
        self._event.synchronize()

    def hold(self, stream: torch.cuda.Stream) -> None:
        """Let what the stream is asked for from now on begin after this point."""
        stream.wait_event(self._event)

    def ms_since(self, earlier: Moment) -> float:
        assert isinstance(earlier, _Event)
        return float(earlier._event.elapsed_time(self._event))


def open_device(device: torch.device, *, clock: Clock, share: float = WHOLE) -> Device:
    """Returns the engine's view of a torch device, `share` of whose memory this process may use if it has its own."""
    return CudaDevice(device, share=share) if device.type == "cuda" else WaitingDevice(device, clock=clock)
