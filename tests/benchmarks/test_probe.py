"""What a watcher says of a server: without its own waiting for a processor, and with all of the server's."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from benchmarks.cases.uploads import probe

_BUSY = "while True: pass"
_ANSWER_S = 0.05


def slow_server(request: httpx.Request) -> httpx.Response:
    time.sleep(_ANSWER_S)
    return httpx.Response(200)


def computing_client(request: httpx.Request) -> httpx.Response:
    """Takes the watcher's own thread that much processor time, however long that lasts."""
    ends_at = time.thread_time() + _ANSWER_S
    while time.thread_time() < ends_at:
        pass
    return httpx.Response(200)


def test_a_late_answer_counts_for_those_that_were_due_meanwhile() -> None:
    with httpx.Client(base_url="http://server", transport=httpx.MockTransport(slow_server)) as client:
        latencies_ms = probe(client, lambda seen: len(seen) < 3, every_s=_ANSWER_S / 2)
    assert latencies_ms[0] >= 1000 * _ANSWER_S * 0.9
    assert latencies_ms[2] - latencies_ms[0] >= 1000 * _ANSWER_S * 0.8


@pytest.mark.skipif(not Path("/proc/thread-self/schedstat").exists(), reason="the system does not tell")
def test_what_the_watcher_waits_for_a_processor_does_not_count() -> None:
    """Two programs share its processor, so that it takes about three times as long as it computes."""
    allowed = os.sched_getaffinity(0)
    one = {min(allowed)}
    os.sched_setaffinity(0, one)
    rivals = [subprocess.Popen([sys.executable, "-c", _BUSY]) for _ in range(2)]  # on the same processor
    try:
        time.sleep(0.5)
        began = time.perf_counter()
        with httpx.Client(base_url="http://server", transport=httpx.MockTransport(computing_client)) as client:
            latencies_ms = probe(client, lambda seen: len(seen) < 4, every_s=0.0)
        took_ms = 1000 * (time.perf_counter() - began)
    finally:
        for rival in rivals:
            rival.kill()
            rival.wait()
        os.sched_setaffinity(0, allowed)
    assert took_ms > 4 * 1000 * _ANSWER_S * 1.5  # else it was not disturbed
    # A probe is due with the one before it, so the last one's latency is the sum of all: its own time, and no more.
    assert latencies_ms[-1] < took_ms / 1.3
