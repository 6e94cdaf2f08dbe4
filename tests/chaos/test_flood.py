"""A server keeps answering while a client holds thousands of unfinished connections to its ports."""

from __future__ import annotations

import json
import resource
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from tests.chaos.flood import FloodPlan, flooding
from tests.serving.conftest import TINY
from tests.serving.launched import LaunchedServer, write_config
from tests.serving.listeners import listeners_of

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]

_HALF_OPEN, _DRIPPING = 4200, 1000
_ATTACK_S = 60.0
_RECOVERY_S = 15.0  # from this time after the start of the attack on, every request must be answered
_SHORT_ATTACK_S = 6.0  # short, because about 25 ports are attacked one after another
_SHORT_RECOVERY_S = 2.0
_NUM_QUIET = 20
_PUBLIC = "127.0.0.2"
_CLIP = {"prompt": "a door closes", "duration": 1, "seed": 5, "steps": 2}


@dataclass(frozen=True, slots=True)
class Probe:
    """A request of a normal client: when it was sent (seconds since the attack began), and how it ended."""

    what: str
    sent_s: float
    took_s: float
    problem: str | None


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LaunchedServer]:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2 * (_HALF_OPEN + 2 * _DRIPPING):
        pytest.skip(f"only {hard} open files are allowed here")
    config = write_config(
        tmp_path_factory.mktemp("flooded"), {"models": [{"name": "tiny", "path": TINY, "max_queue_s": 1e6}]}
    )
    launched = LaunchedServer(config, host=_PUBLIC)
    try:
        yield launched.wait_until_ready()
    finally:
        launched.stop()


def ask(url: str, began_at: float, what: str) -> Probe:
    """Send one request of the kind `what` ("health" or "clip") on a new connection."""
    sent_at = time.monotonic()
    try:
        with httpx.Client(base_url=url, timeout=10, trust_env=False) as client:
            answer = client.get("/health") if what == "health" else client.post("/generate", json=_CLIP)
        problem = None if answer.status_code == 200 else f"{answer.status_code}: {answer.text[:100]}"
    except httpx.HTTPError as error:
        problem = repr(error)
    now = time.monotonic()
    return Probe(what, sent_at - began_at, now - sent_at, problem)


def probe_for(url: str, seconds: float) -> list[Probe]:
    """Send requests for `seconds`: health checks in one thread, and clip requests in another."""
    began_at = time.monotonic()
    probes: list[Probe] = []

    def keep_sending(what: str) -> None:
        while time.monotonic() - began_at < seconds:
            probes.append(ask(url, began_at, what))
            time.sleep(0.2)

    threads = [threading.Thread(target=keep_sending, args=(what,)) for what in ("health", "clip")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return probes


def p95(values: Sequence[float]) -> float:
    return statistics.quantiles(values, n=20, method="inclusive")[-1]


@pytest.fixture(scope="module")
def bounds(server: LaunchedServer) -> dict[str, float]:
    """Measure response times without an attack. Return the longest allowed times under attack, by kind of request."""
    quiet = [ask(server.url, time.monotonic(), what) for _ in range(_NUM_QUIET) for what in ("health", "clip")]
    assert not [probe for probe in quiet if probe.problem]
    quiet_p95 = {what: p95([probe.took_s for probe in quiet if probe.what == what]) for what in ("health", "clip")}
    print(f"flood: quiet p95 {quiet_p95}", flush=True)
    return {what: max(3 * took_s, 1.0) for what, took_s in quiet_p95.items()}


def attack(
    server: LaunchedServer, plan: FloodPlan, bounds: dict[str, float], *, recovery_s: float
) -> tuple[list[Probe], list[dict[str, Any]]]:
    """Attack the server, and send normal requests. Returns the late or failed requests, and the attacker's reports.

    Only requests that were sent at least `recovery_s` after the start of the attack count.
    """
    with flooding(plan) as attacker:
        probes = probe_for(server.url, plan.seconds - 2)
        assert attacker.stdout is not None
        attacker.kill()
        held = [json.loads(line) for line in attacker.stdout]
    for what in bounds:
        times = [probe.took_s for probe in probes if probe.what == what and probe.sent_s >= recovery_s]
        first = min((p.sent_s + p.took_s for p in probes if p.what == what and not p.problem), default=None)
        failed = sum(probe.problem is not None for probe in probes if probe.what == what)
        print(
            f"flood {plan.host}:{plan.port}: {what}: first answer after {first} s, {failed} of "
            f"{sum(p.what == what for p in probes)} failed; after {recovery_s:g} s {len(times)} took p95 "
            f"{p95(times) if len(times) > 1 else None}, max {max(times, default=None)} (bound {bounds[what]:.2f}); "
            f"held {held[-1] if held else None}",
            flush=True,
        )
    late = [
        probe
        for probe in probes
        if probe.sent_s >= recovery_s and (probe.problem is not None or probe.took_s > bounds[probe.what])
    ]
    return late, held


def test_half_open_connections_and_slow_uploads_delay_no_request(
    server: LaunchedServer, bounds: dict[str, float]
) -> None:
    plan = FloodPlan(_PUBLIC, server.port, _HALF_OPEN, _DRIPPING, _ATTACK_S)
    late, held = attack(server, plan, bounds, recovery_s=_RECOVERY_S)
    assert max(now["half_open"] + now["dripping"] for now in held) > 0.9 * (_HALF_OPEN + _DRIPPING)
    assert not late


def test_server_cannot_be_reached_around_haproxy(server: LaunchedServer) -> None:
    open_to_all = [one for one in listeners_of([server.process.pid, *server.pids("")]) if not one.is_local]
    assert all(one.title.startswith("ray::ServeReplica") for one in open_to_all)
    assert {one.host for one in open_to_all} <= {"::", "0.0.0.0"}
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{server.port}/health")


def test_half_open_connections_to_other_ports_delay_no_request(
    server: LaunchedServer, bounds: dict[str, float]
) -> None:
    others = [one for one in listeners_of([server.process.pid, *server.pids("")]) if one.port != server.port]
    assert len(others) > 10
    met = {}
    for one in others:
        host, port = one.reachable_at
        plan = FloodPlan(host, port, _HALF_OPEN, 0, _SHORT_ATTACK_S)
        print(f"flood: {one.title[:100]}", flush=True)
        late, _ = attack(server, plan, bounds, recovery_s=_SHORT_RECOVERY_S)
        if late:
            met[one] = late
    assert not met
