"""Kill processes of one server, one after another, in an order that a seed determines.

Processes that do not belong to the server are never killed.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Literal

import httpx

from tests.serving.launched import LaunchedServer

Target = Literal["engine", "runner", "ingress", "controller", "proxy", "database"]


@dataclass(frozen=True, slots=True)
class ProcessKind:
    """A kind of process. `title` is text in the command line of such a process.

    `number` is the number of such processes in a complete server.
    """

    title: str
    number: int
    deployment: str | None = None


# The processes of the server that `scene` starts. The database is not one of them: it is a server of its own.
KINDS: Mapping[Target, ProcessKind] = {
    "engine": ProcessKind("ray::ServeReplica:audio:tiny", 2, "tiny"),
    "runner": ProcessKind("ray::ServeReplica:audio:job-runner", 2, "job-runner"),
    "ingress": ProcessKind("ray::ServeReplica:audio:Ingress", 2, "Ingress"),
    "controller": ProcessKind("ray::ServeController", 1),
    "proxy": ProcessKind("/haproxy -db ", 1),
}
_POLL_S = 0.2
_ANSWER_S = 5.0
_BACK_S = 60.0


@dataclass(frozen=True, slots=True)
class PlannedKill:
    """A kill that is planned for `at_s` seconds after the start of the run."""

    at_s: float
    target: Target


@dataclass(frozen=True, slots=True)
class Kill:
    """A kill that was carried out, at Unix time `at`."""

    at: float
    target: Target


def plan_kills(*, rounds: int, every_s: float, seed: int) -> list[PlannedKill]:
    """Return planned kills. In each round, one process of every kind is killed, in random order and at random times.

    The plan also restarts the database once.
    """
    rng = random.Random(f"strikes/{seed}")
    targets: list[Target] = []
    for _ in range(rounds):
        targets += rng.sample(list(KINDS), len(KINDS))
    targets.insert(rng.randrange(1, len(targets)), "database")
    times = [every_s * (index + 1 + rng.uniform(-0.4, 0.4)) for index in range(len(targets))]
    return [PlannedKill(at_s, target) for at_s, target in zip(times, targets, strict=True)]


class NotBackError(Exception):
    """A killed process was not replaced in time."""


async def carry_out(
    server: LaunchedServer,
    planned_kills: Sequence[PlannedKill],
    *,
    crash_database: Callable[[], None],
    seed: int,
    report: Callable[[Kill], None],
) -> list[Kill]:
    """Carry out a plan. Each kill waits until the previous victim is replaced.

    Raises NotBackError if a replacement takes too long.
    """
    rng = random.Random(f"victims/{seed}")
    started_at = time.monotonic()
    kills = []
    with running_census(server) as census:
        for planned_kill in planned_kills:
            await asyncio.sleep(max(0.0, started_at + planned_kill.at_s - time.monotonic()))
            at = time.time()
            if planned_kill.target == "database":
                await asyncio.to_thread(crash_database)
                report(kill := Kill(at, planned_kill.target))
            else:
                at, pid = await _kill(server, KINDS[planned_kill.target], rng)
                report(kill := Kill(at, planned_kill.target))
                is_back = partial(_is_back, server, KINDS[planned_kill.target], pid, census)
                await wait_until_back(planned_kill.target, killed=pid, is_back=is_back)
            kills.append(kill)
    return kills


async def _kill(server: LaunchedServer, kind: ProcessKind, rng: random.Random) -> tuple[float, int]:
    """Kill one process of this kind. Returns the time of the kill (Unix time) and the process id."""
    while True:
        pids = await asyncio.to_thread(server.pids, kind.title)
        if pids:
            with suppress(ProcessLookupError):
                os.kill(pid := rng.choice(pids), signal.SIGKILL)
                return time.time(), pid
        await asyncio.sleep(_POLL_S)


async def wait_until_back(
    target: Target, *, killed: int, is_back: Callable[[], bool], within_s: float = _BACK_S
) -> None:
    """Wait until the killed process is replaced and the server works. Raises NotBackError."""
    deadline = time.monotonic() + within_s
    while not await asyncio.to_thread(is_back):
        if time.monotonic() > deadline:
            raise NotBackError(f"{target}: process {killed} was not replaced within {within_s:g} s of its end")
        await asyncio.sleep(_POLL_S)


def _is_back(server: LaunchedServer, kind: ProcessKind, killed: int, census: Census) -> bool:
    if len(set(server.pids(kind.title)) - {killed}) < kind.number:
        return False
    running = census.take()
    if running is None or (kind.deployment and running.get(kind.deployment, 0) < kind.number):
        return False
    try:
        return httpx.get(f"{server.url}/ready", timeout=_ANSWER_S).status_code == 200
    except httpx.HTTPError:
        return False


class Census:
    """The latest line that the program `census.py` has printed."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._num_taken = 0
        self._latest: Mapping[str, int] = {}
        self._has_new = threading.Condition()
        threading.Thread(target=self._read, daemon=True).start()

    def take(self) -> Mapping[str, int] | None:
        """Return the number of running replicas of each deployment, counted after this call, or None on timeout."""
        with self._has_new:
            # Wait for two lines. The program may have begun the count of the next line before this call.
            newer = self._num_taken + 2
            is_newer = self._has_new.wait_for(lambda: self._num_taken >= newer, timeout=_ANSWER_S)
            return self._latest if is_newer else None

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with self._has_new:
                self._latest = json.loads(line)
                self._num_taken += 1
                self._has_new.notify_all()


@contextmanager
def running_census(server: LaunchedServer) -> Iterator[Census]:
    """Run the program `census.py` until the context ends."""
    process = server.look_inside("tests.chaos.census")
    try:
        yield Census(process)
    finally:
        process.kill()
        process.wait()
