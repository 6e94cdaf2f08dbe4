"""An arrival as the amount of device work it is, for simulators and their devices. Knows no scheduler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.arrivals import Arrival
from stable_audio_serve.engine.scheduling.work import RowWork
from stable_audio_serve.models.protocol import WindowRule


@dataclass(frozen=True, slots=True)
class Shape:
    """How a model cuts a request: its latent `frames`, and the frames of each window of its decoder.

    With a `rule` an engine may cut other windows.
    """

    frames: Callable[[float], int]  # of a duration in seconds
    windows: Callable[[int], Sequence[int]]  # of a clip's latent frames
    rule: WindowRule | None = None

    def work(self, arrival: Arrival) -> RowWork:
        """Returns the work of the request; a guided step takes two network rows."""
        frames = self.frames(arrival.duration_s)
        branches = [2 if arrival.is_guided else 1] * arrival.steps
        return RowWork(frames, branches=branches, decode_left=self.windows(frames))


@dataclass(frozen=True, slots=True)
class Outcome:
    """When a request was due and when its audio was there, in seconds."""

    arrival: Arrival
    ended_at: float

    @property
    def latency_ms(self) -> float:
        return (self.ended_at - self.arrival.at_s) * 1000.0
