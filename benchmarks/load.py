"""Sends requests to a server at their scheduled times, even if earlier requests are late, and records the outcomes.

The server runs in this process or behind HTTP. Latencies include delays of this client. Also records the processor time
that other programs use meanwhile, which are all processes except this one and its descendants. If they use too much,
the measurement is void and is repeated a few times.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from benchmarks.workload import Arrival, to_request
from stable_audio_serve.core.errors import OverloadedError, StableAudioError
from stable_audio_serve.core.generation import Lora

if TYPE_CHECKING:
    import psutil  # not installed on every machine, so imported only where needed

    from benchmarks.sides.servers import Side  # imports torch, which HTTP clients do not need

Audio = npt.NDArray[np.float32]
Item = TypeVar("Item")
Measured = TypeVar("Measured")

LARGEST_FOREIGN_CORES = 0.1
_MOST_REPEATS = 3  # how often a void measurement is repeated
_MOST_ATTEMPTS = 20
_DEFAULT_RETRY_S = 1.0  # pause after a refusal without Retry-After


@dataclass(frozen=True, slots=True)
class Answer:
    """A server's response: the times of stages that the server reported, and the number of samples (0: unknown).

    `read` decodes the audio and returns it as float32 of shape (channels, samples).
    """

    stages_ms: Mapping[str, float]
    num_samples: int
    read: Callable[[], Audio]


class RefusedError(Exception):
    """A server refused a request because it was full (429 or 503). `retry_after_s` is the header Retry-After."""

    def __init__(self, message: str, *, retry_after_s: float | None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Asker(Protocol):
    """A client of one compared server (side), in this process or over HTTP."""

    async def ask(self, arrival: Arrival) -> Answer:
        """Send a request and return the response after its last byte.

        Raises RefusedError, or RuntimeError if the response is not audio.
        """

    async def settle(self) -> None:
        """Wait until the idle server has finished its own optimisations, such as capturing CUDA graphs."""


class InProcess:
    """A client of a compared server in this process."""

    def __init__(self, side: Side, adapters: Sequence[Lora] = ()) -> None:
        self._side = side
        self._adapters = adapters

    async def ask(self, arrival: Arrival) -> Answer:
        try:
            result = await self._side.generate(to_request(arrival, self._adapters))
        except OverloadedError as error:
            raise RefusedError(error.message, retry_after_s=error.retry_after_s) from error
        except StableAudioError as error:
            raise RuntimeError(str(error)) from error
        return Answer({}, result.audio[0].shape[-1], lambda: result.audio[0])

    async def settle(self) -> None:
        await self._side.settle()


@dataclass(frozen=True, slots=True)
class Record:
    """The outcome of one request. Times are seconds from the start of the list of requests.

    `error` is the message of a failure.
    """

    index: int
    due_at: float
    ended_at: float
    audio_s: float
    steps: int
    outcome: Literal["finished", "refused", "failed"] = "finished"
    stages_ms: Mapping[str, float] = field(default_factory=dict)
    num_samples: int = 0
    retry_after_s: float | None = None
    error: str = ""

    @property
    def latency_ms(self) -> float:
        """The time from the scheduled arrival to the last byte of the response."""
        return (self.ended_at - self.due_at) * 1000.0

    @property
    def is_finished(self) -> bool:
        return self.outcome == "finished"


async def play(asker: Asker, arrivals: Iterable[Arrival]) -> list[Record]:
    """Send each request at its scheduled time (open loop). Returns the records in the order of `arrivals`."""
    return [attempts[0] for attempts in await play_until_served(asker, arrivals, most_attempts=1)]


async def play_until_served(
    asker: Asker, arrivals: Iterable[Arrival], *, most_attempts: int = _MOST_ATTEMPTS
) -> list[list[Record]]:
    """Send each request at its scheduled time. After a refusal, wait for the time in Retry-After and send it again.

    Returns the records of all attempts, for each request.
    """
    started_at = time.perf_counter()

    async def send(index: int, arrival: Arrival) -> list[Record]:
        attempts: list[Record] = []
        while not attempts or (attempts[-1].outcome == "refused" and len(attempts) < most_attempts):
            if attempts:
                due_at = attempts[-1].ended_at + (attempts[-1].retry_after_s or _DEFAULT_RETRY_S)
                arrival = replace(arrival, at_s=due_at)
            await asyncio.sleep(max(0.0, arrival.at_s - (time.perf_counter() - started_at)))
            attempts.append(await _send(asker, arrival, index=index, started_at=started_at))
        return attempts

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(send(*numbered)) for numbered in enumerate(arrivals)]
    return [task.result() for task in tasks]


async def play_alone(asker: Asker, arrivals: Iterable[Arrival]) -> list[Record]:
    """Send one request after another. The times in a record count from the moment when its request was sent."""
    return [(await play(asker, [replace(arrival, at_s=0.0)]))[0] for arrival in arrivals]


async def send_in_flight(
    send: Callable[[Item], Awaitable[object]], items: Sequence[Item], *, num_in_flight: int
) -> list[float]:
    """Call `send` with each item, keeping `num_in_flight` calls in progress (closed loop).

    Returns the time at which each call ended, in seconds from the start, in order of completion.
    """
    started_at = time.perf_counter()
    waiting, ended_at = iter(items), []

    async def work() -> None:
        for item in waiting:
            await send(item)
            ended_at.append(time.perf_counter() - started_at)

    async with asyncio.TaskGroup() as group:
        for _ in range(num_in_flight):
            group.create_task(work())
    return ended_at


async def play_clips(asker: Asker, arrivals: Iterable[Arrival], *, sample_rate_hz: int) -> list[Record]:
    """Like `play`, but raises RuntimeError unless every response is audio of the requested length."""
    records = await play(asker, arrivals)
    for record in records:
        if not record.is_finished or record.num_samples != int(record.audio_s * sample_rate_hz):
            got = f"{record.outcome}, {record.num_samples} samples {record.error}"
            raise RuntimeError(f"{record.audio_s:.3f} s of audio were asked for: {got}")
    return records


async def _send(asker: Asker, arrival: Arrival, *, index: int, started_at: float) -> Record:
    record = Record(index, arrival.at_s, arrival.at_s, arrival.duration_s, arrival.steps)
    try:
        answer = await asker.ask(arrival)
        record = replace(record, stages_ms=dict(answer.stages_ms), num_samples=answer.num_samples)
    except RefusedError as error:
        record = replace(record, outcome="refused", retry_after_s=error.retry_after_s)
    except (RuntimeError, OSError) as error:
        record = replace(record, outcome="failed", error=f"{type(error).__name__}: {error}")
    return replace(record, ended_at=time.perf_counter() - started_at)


async def in_quiet(measure: Callable[[], Awaitable[Measured]]) -> tuple[Measured, float]:
    """Call `measure`, and repeat the call a few times if other programs disturb it.

    Returns the last result, and the mean number of cores that other programs used during the last call.
    """
    for _ in range(1 + _MOST_REPEATS):
        before, machine_s, started_at = _own_s(), _machine_s(), time.perf_counter()
        measured = await measure()
        elapsed_s, used_s = time.perf_counter() - started_at, _machine_s() - machine_s
        own_s = sum(max(0.0, now_s - before.get(pid, 0.0)) for pid, now_s in _own_s().items())
        foreign_cores = max(0.0, used_s - own_s) / elapsed_s
        if foreign_cores <= LARGEST_FOREIGN_CORES:
            break
    return measured, foreign_cores


def describe_quiet(foreign_cores: Sequence[float | None]) -> dict[str, Any]:
    """Returns a dict that says whether any measurement is void, and how many cores other programs used in each.

    None stands for a measurement that was not watched.
    """
    is_void = any(cores is not None and cores > LARGEST_FOREIGN_CORES for cores in foreign_cores)
    return {"is_void": is_void, "foreign_cores": list(foreign_cores)}


def _machine_s() -> float:
    import psutil

    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system)


def _own_s() -> dict[int, float]:
    """Returns the processor time of this process and its descendants in seconds, by process id."""
    import psutil

    used: dict[int, float] = {}
    for process in family():
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            used[process.pid] = float(times.user + times.system)
    return used


def family(pid: int | None = None) -> list[psutil.Process]:
    """Returns a process (default: this one) and its descendants, or an empty list if the process has ended."""
    import psutil

    try:
        first = psutil.Process(pid)
        return [first, *first.children(recursive=True)]
    except psutil.Error:
        return []
