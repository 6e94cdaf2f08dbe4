"""Kills one process of one server after the other, in an order that a seed repeats. Touches nobody else's processes."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from tests.serving.launched import LaunchedServer

Target = Literal["engine", "runner", "ingress", "controller", "database"]

# What the command lines of a server's processes contain; the database is no process of the server.
_TITLES: Mapping[Target, str] = {
    "engine": "ray::ServeReplica:audio:tiny",
    "runner": "ray::ServeReplica:audio:job-runner",
    "ingress": "ray::ServeReplica:audio:Ingress",
    "controller": "ray::ServeController",
}
_LOOK_S = 0.2


@dataclass(frozen=True, slots=True)
class Strike:
    """One planned blow, seconds from the start."""

    at_s: float
    target: Target


@dataclass(frozen=True, slots=True)
class Blow:
    """One that was struck, at Unix time `at`."""

    at: float
    target: Target


def plan_strikes(*, rounds: int, every_s: float, seed: int) -> list[Strike]:
    """Each round kills one of every kind, in an order and at times that the seed draws; the database goes down once."""
    rng = random.Random(f"strikes/{seed}")
    targets: list[Target] = []
    for _ in range(rounds):
        targets += rng.sample(list(_TITLES), len(_TITLES))
    targets.insert(rng.randrange(1, len(targets)), "database")
    times = [every_s * (index + 1 + rng.uniform(-0.4, 0.4)) for index in range(len(targets))]
    return [Strike(at_s, target) for at_s, target in zip(times, targets, strict=True)]


async def strike_all(
    server: LaunchedServer,
    strikes: Sequence[Strike],
    *,
    crash_database: Callable[[], None],
    seed: int,
    report: Callable[[Blow], None],
) -> list[Blow]:
    """Carry out a plan. A kind of which none lives is waited for, and the strikes behind it come later."""
    rng = random.Random(f"victims/{seed}")
    started_at = time.monotonic()
    blows = []
    for strike in strikes:
        await asyncio.sleep(max(0.0, started_at + strike.at_s - time.monotonic()))
        at = time.time()
        if strike.target == "database":
            await asyncio.to_thread(crash_database)
        else:
            at = await _kill(server, _TITLES[strike.target], rng)
        blows.append(Blow(at, strike.target))
        report(blows[-1])
    return blows


async def _kill(server: LaunchedServer, title: str, rng: random.Random) -> float:
    """Kill one process with that title; the Unix time."""
    while True:
        pids = await asyncio.to_thread(server.pids, title)
        if pids:
            with suppress(ProcessLookupError):
                os.kill(rng.choice(pids), signal.SIGKILL)
                return time.time()
        await asyncio.sleep(_LOOK_S)
