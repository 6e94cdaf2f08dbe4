"""An attacker without a key, as a program: `python -m tests.chaos.flood '<JSON of FloodPlan>'`.

It opens connections that never complete a request, and reopens them when they are closed. It attacks only this
machine.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass

_DRIP_EVERY_S = 2.0
_RENEW_AFTER_S = 0.1
_CONNECT_TIMEOUT_S = 10.0
_AT_ONCE = 200  # largest number of connections that the attacker is opening at the same time
_UPLOAD = (
    b"POST /v1/audio/variations HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: multipart/form-data; boundary=B\r\n"
    b"Content-Length: 1000000\r\n\r\n-"
)


_NICENESS = 10  # low CPU priority, so that only the connections slow the server down, not the attacker's CPU use


@dataclass(frozen=True, slots=True)
class FloodPlan:
    """The port to attack, the numbers of connections of each kind, and the duration."""

    host: str
    port: int
    num_half_open: int
    num_dripping: int
    seconds: float


@dataclass(slots=True)
class _Held:
    half_open: int = 0
    dripping: int = 0
    renewed: int = 0


@contextmanager
def flooding(plan: FloodPlan) -> Iterator[subprocess.Popen[str]]:
    """Run the attacker as a process. Once a second, it prints how many connections it holds, as JSON."""
    command = [sys.executable, "-m", "tests.chaos.flood", json.dumps(asdict(plan))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


async def _attack(plan: FloodPlan) -> None:
    os.nice(_NICENESS)
    held, gate = _Held(), asyncio.Semaphore(_AT_ONCE)
    tasks = [asyncio.create_task(_hold_half_open(plan, held, gate)) for _ in range(plan.num_half_open)]
    tasks += [asyncio.create_task(_hold_upload(plan, held, gate)) for _ in range(plan.num_dripping)]
    with suppress(TimeoutError):
        async with asyncio.timeout(plan.seconds):
            while True:
                await asyncio.sleep(1)
                print(json.dumps(asdict(held)), flush=True)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _hold_half_open(plan: FloodPlan, held: _Held, gate: asyncio.Semaphore) -> None:
    """Hold a connection on which only one byte of a request is sent. Open a new one when the server closes it."""
    while True:
        with suppress(OSError, TimeoutError):
            reader, writer = await _connect(plan, gate)
            held.half_open += 1
            try:
                writer.write(b"P")  # the first byte of POST, and of the HTTP/2 preface PRI
                await reader.read()
            finally:
                held.half_open -= 1
                writer.transport.abort()
        held.renewed += 1
        await asyncio.sleep(_RENEW_AFTER_S)


async def _hold_upload(plan: FloodPlan, held: _Held, gate: asyncio.Semaphore) -> None:
    """Hold a connection that uploads a large body one byte at a time. Open a new one when the server ends it."""
    while True:
        with suppress(OSError, TimeoutError):
            reader, writer = await _connect(plan, gate)
            held.dripping += 1
            answer = asyncio.create_task(reader.read(1))
            try:
                writer.write(_UPLOAD)
                while not answer.done():
                    await asyncio.wait({answer}, timeout=_DRIP_EVERY_S)
                    writer.write(b"-")
            finally:
                held.dripping -= 1
                answer.cancel()
                writer.transport.abort()
                with suppress(OSError, asyncio.CancelledError):
                    await answer
        held.renewed += 1
        await asyncio.sleep(_RENEW_AFTER_S)


async def _connect(plan: FloodPlan, gate: asyncio.Semaphore) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    async with gate, asyncio.timeout(_CONNECT_TIMEOUT_S):
        return await asyncio.open_connection(plan.host, plan.port)


def main() -> None:
    plan = FloodPlan(**json.loads(sys.argv[1]))
    assert ipaddress.ip_address(plan.host).is_loopback
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    asyncio.run(_attack(plan))


if __name__ == "__main__":
    main()
