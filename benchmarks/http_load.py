"""Sends arrival lists to a running server from a process of its own, open loop, and notes what became of each request.

What is late at the client is late in the figures. Judges nothing and knows no case.
"""

from __future__ import annotations

import asyncio
import io
import time
import wave
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal

import aiohttp

from benchmarks.arrivals import Arrival
from benchmarks.client import Now, another_process, play_open_loop
from benchmarks.compare.asking import RefusedError
from benchmarks.compare.dialects import StableAudio3, open_session, read_stages

Outcome = Literal["finished", "refused", "failed"]

_START_S = 0.1  # until the list begins, so that not even its first request is late
_AROUND = ("total", "encode", "store")  # what a server says of a request besides the engine's stages
_MOST_ATTEMPTS = 20
_NOT_TOLD_S = 1.0
_SAMPLE_BYTES = 2


@dataclass(frozen=True, slots=True)
class Sent:
    """One request, times in seconds from the list's start.

    `num_bytes` are those of the audio file, `sample_bytes` those of its samples if it is a WAV file, `stages_ms` what
    the server says of the request, `retry_after_s` what it said when it refused, `error` the text of any other answer
    than audio.
    """

    due_at: float
    sent_at: float
    ended_at: float
    outcome: Outcome = "finished"
    num_bytes: int = 0
    sample_bytes: int = 0
    stages_ms: Mapping[str, float] = field(default_factory=dict)
    retry_after_s: float | None = None
    error: str = ""

    @property
    def latency_ms(self) -> float:
        """From the scheduled arrival to the last byte."""
        return (self.ended_at - self.due_at) * 1000.0

    @property
    def late_ms(self) -> float:
        """From the scheduled arrival until the client sent it."""
        return (self.sent_at - self.due_at) * 1000.0

    @property
    def replica_ms(self) -> float:
        """The replica's own time, waiting for its device included."""
        return sum(ms for stage, ms in self.stages_ms.items() if stage not in _AROUND)

    @property
    def queue_ms(self) -> float:
        """The part of it spent waiting for the device."""
        return self.stages_ms.get("queue", 0.0)

    @property
    def added_ms(self) -> float:
        """What everything around the replica took: client, HTTP, routing, encoding."""
        return self.latency_ms - self.replica_ms


@dataclass(frozen=True, slots=True)
class Load:
    """A list that was sent, in its order; `cpu_s` of processor time the client needed for it."""

    sent: Sequence[Sent]
    cpu_s: float

    @property
    def span_s(self) -> float:
        """From the first scheduled arrival to the last byte."""
        return max(request.ended_at for request in self.sent) - min(request.due_at for request in self.sent)

    @property
    def rate_hz(self) -> float:
        """Finished requests per second."""
        return sum(request.outcome == "finished" for request in self.sent) / self.span_s

    @property
    def client_cores(self) -> float:
        """The share of a core that the client took: near 1 it is what was measured."""
        return self.cpu_s / self.span_s


class LoadGenerator:
    """Sends to one server."""

    def __init__(self, pool: ProcessPoolExecutor, url: str) -> None:
        self._pool = pool
        self._url = url

    def send(self, model: str, arrivals: Sequence[Arrival]) -> Load:
        """Send each at its time, however late the others are, and wait for every answer."""
        return self._pool.submit(_send, self._url, model, tuple(arrivals)).result()

    def send_until_admitted(self, model: str, arrivals: Sequence[Arrival]) -> list[Sequence[Sent]]:
        """Send each at its time, and again whenever it was refused and the time that it was told has passed.

        Returns all attempts of each; times are on one clock.
        """
        return self._pool.submit(_send_again, self._url, model, tuple(arrivals)).result()

    def send_alone(self, model: str, arrivals: Sequence[Arrival]) -> list[Sent]:
        """Send one after another, each due when it is sent; times are from the start of each."""
        return [self.send(model, [replace(arrival, at_s=0.0)]).sent[0] for arrival in arrivals]


@contextmanager
def load_generator(url: str) -> Iterator[LoadGenerator]:
    """Gives what sends to the server at `url`."""
    with another_process() as pool:
        yield LoadGenerator(pool, url)


def require_clips(load: Load, arrivals: Sequence[Arrival], *, channels: int, sample_rate_hz: int) -> None:
    """Raise RuntimeError unless every answer is a 16-bit WAV file of the length asked for."""
    for sent, arrival in zip(load.sent, arrivals, strict=True):
        sample_bytes = int(arrival.duration_s * sample_rate_hz) * channels * _SAMPLE_BYTES
        if (sent.outcome, sent.sample_bytes) != ("finished", sample_bytes):
            said = f"{sent.outcome}, {sent.num_bytes} bytes, {sent.sample_bytes} of samples {sent.error}"
            raise RuntimeError(f"{arrival.duration_s:.3f} s of audio were asked for: {said}")


def _send(url: str, model: str, arrivals: Sequence[Arrival]) -> Load:  # noqa: PLR0917 - in another process
    return asyncio.run(_send_all(url, model, arrivals=arrivals))


def _send_again(url: str, model: str, arrivals: Sequence[Arrival]) -> list[Sequence[Sent]]:  # noqa: PLR0917 - as above
    return asyncio.run(_send_all_again(url, model, arrivals=arrivals))


async def _send_all_again(url: str, model: str, *, arrivals: Sequence[Arrival]) -> list[Sequence[Sent]]:
    async with open_session(url) as http:

        async def send(arrival: Arrival, now: Now) -> Sequence[Sent]:
            attempts = [await _send_one(http, model, arrival=arrival, now=now)]
            while attempts[-1].outcome == "refused" and len(attempts) < _MOST_ATTEMPTS:
                due_at = attempts[-1].ended_at + (attempts[-1].retry_after_s or _NOT_TOLD_S)
                await asyncio.sleep(max(0.0, due_at - now()))
                attempts.append(await _send_one(http, model, arrival=replace(arrival, at_s=due_at), now=now))
            return attempts

        return await play_open_loop(arrivals, send, due_at=lambda arrival: arrival.at_s, starts_in_s=_START_S)


async def _send_all(url: str, model: str, *, arrivals: Sequence[Arrival]) -> Load:
    async with open_session(url) as http:

        async def send(arrival: Arrival, now: Now) -> Sent:
            return await _send_one(http, model, arrival=arrival, now=now)

        used_s = time.process_time()
        sent = await play_open_loop(arrivals, send, due_at=lambda arrival: arrival.at_s, starts_in_s=_START_S)
        return Load(sent, time.process_time() - used_s)


async def _send_one(http: aiohttp.ClientSession, model: str, *, arrival: Arrival, now: Now) -> Sent:
    sent_at = now()
    sent = Sent(due_at=arrival.at_s, sent_at=sent_at, ended_at=sent_at)
    try:
        reply = await StableAudio3().fetch(http, arrival, model=model)
        size = len(reply.content)
        samples = _count_sample_bytes(reply.content) if arrival.audio_format == "wav" else 0
        sent = replace(sent, num_bytes=size, sample_bytes=samples, stages_ms=read_stages(reply))
    except RefusedError as error:
        sent = replace(sent, outcome="refused", retry_after_s=error.retry_after_s)
    except (RuntimeError, aiohttp.ClientError, TimeoutError) as error:
        sent = replace(sent, outcome="failed", error=f"{type(error).__name__}: {error}")
    return replace(sent, ended_at=now())


def _count_sample_bytes(file: bytes) -> int:
    """Returns how many bytes of samples a WAV file has, 0 for one that is none or ends before they do."""
    try:
        with wave.open(io.BytesIO(file)) as reader:
            num_bytes = reader.getnframes() * reader.getnchannels() * reader.getsampwidth()
            return num_bytes if len(reader.readframes(reader.getnframes())) == num_bytes else 0
    except (wave.Error, EOFError):
        return 0
