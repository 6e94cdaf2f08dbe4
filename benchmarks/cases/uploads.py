"""How fast minute-long stereo files are taken, and whether somebody else's `/health` notices.

The files are sent from another process, so that making and sending them does not slow the one that watches.
"""

from __future__ import annotations

import io
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from benchmarks.cases.engine import resolve_model
from benchmarks.client import another_process
from benchmarks.metrics import percentile, summarize
from benchmarks.servers.process import Server, running_instant_app, running_server, write_config
from benchmarks.settings import CaseSettings

_FILE_S = 60.0
_RATE_HZ = 44_100
_UPLOADS_PER_ROUND = 8
_EVERY_S = {"paced": 1.0, "full speed": 0.0}  # paced is 60x real-time; at full speed the sender takes a core of its own
_PROBE_EVERY_S = 0.02
_IDLE_PROBES = 100
_SCHEDSTAT = Path("/proc/thread-self/schedstat")
_FORMATS = ("WAV", "FLAC", "MP3")


def run_uploads_case(settings: CaseSettings, *, file_s: float = _FILE_S) -> dict[str, Any]:
    """Each kind of file on each server, paced and at full speed, `settings.rounds` times; the worse round counts."""
    with tempfile.TemporaryDirectory() as folder:
        config = write_config(
            Path(folder),
            resolve_model(settings.model),
            threads=settings.threads,
            import_path="benchmarks.servers.instant:build",
        )
        starts: Mapping[str, Callable[[], Any]] = {"app": running_instant_app, "serve": partial(running_server, config)}
        results = []
        for side, start in starts.items():
            with start() as server:
                results += [
                    {"side": side} | figures for figures in _measure(server, rounds=settings.rounds, file_s=file_s)
                ]
    return {"file_s": file_s, "target": {"realtime_factor": 5.0, "health_p95_ms": 20.0}, "results": results}


def _measure(server: Server, *, rounds: int, file_s: float) -> Iterator[dict[str, Any]]:
    for kind in _FORMATS:
        data = make_file(kind, duration_s=file_s)
        for pace, every_s in _EVERY_S.items():
            runs = [measure_round(server, data, every_s=every_s, file_s=file_s) for _ in range(rounds)]
            yield {
                "kind": kind,
                "pace": pace,
                "worst_realtime_factor": min(run["realtime_factor"] for run in runs),
                "worst_health_p95_ms": max(run["health_during_uploads"]["p95_ms"] for run in runs),
                "rounds": runs,
            }


def make_file(container: str, *, duration_s: float) -> bytes:
    """Stereo chords under a little noise."""
    import soundfile

    t = np.arange(int(duration_s * _RATE_HZ)) / _RATE_HZ
    noise = np.random.default_rng(0).normal(0.0, 0.02, (2, len(t)))
    audio = (0.2 * (np.sin(2 * np.pi * 220 * t) + np.sin(2 * np.pi * 331 * t)) + noise).T
    stream = io.BytesIO()
    with soundfile.SoundFile(stream, "w", _RATE_HZ, 2, format=container) as file:
        for start in range(0, len(audio), 65_536):
            file.write(audio[start : start + 65_536])
    return stream.getvalue()


def send_uploads(url: str, data: bytes, *, count: int, every_s: float) -> list[float]:
    """Seconds each of `count` uploads took from its first byte to the answer; one starts `every_s` after the other, or
    when the other is done. Runs in a process of its own. Raises RuntimeError when one is refused."""
    took_s = []
    with httpx.Client(base_url=url, timeout=120.0, trust_env=False) as client:
        due_at = time.perf_counter()
        for _ in range(count):
            time.sleep(max(0.0, due_at - time.perf_counter()))
            due_at += every_s
            started_at = time.perf_counter()
            form = {"prompt": "x", "duration": "1", "seed": "1"}
            answer = client.post("/v1/audio/variations", data=form, files={"audio": ("a", data)})
            took_s.append(time.perf_counter() - started_at)
            if answer.status_code != 200:
                raise RuntimeError(f"upload refused: {answer.status_code} {answer.text[:200]}")
    return took_s


def measure_round(
    server: Server, data: bytes, *, every_s: float, file_s: float, idle_probes: int = _IDLE_PROBES
) -> dict[str, Any]:
    """One file several times, one watcher; figures in milliseconds."""
    with another_process() as pool, httpx.Client(base_url=server.url, timeout=30.0, trust_env=False) as client:
        # The first upload starts the sending process and the server's decoder.
        pool.submit(send_uploads, server.url, data, count=1, every_s=0.0).result()
        idle_ms = probe(client, lambda probes: len(probes) < idle_probes)
        sending: Future[list[float]] = pool.submit(
            send_uploads, server.url, data, count=_UPLOADS_PER_ROUND, every_s=every_s
        )
        busy_ms = probe(client, lambda _: not sending.done())
        took_s = sending.result()
    return {
        "file_bytes": len(data),
        "realtime_factor": file_s / percentile(took_s, 0.5),
        "upload": asdict(summarize([seconds * 1000.0 for seconds in took_s])),
        "health_idle": asdict(summarize(idle_ms)),
        "health_during_uploads": asdict(summarize(busy_ms)),
    }


def probe(
    client: httpx.Client,
    goes_on: Callable[[list[float]], bool],
    *,
    path: str = "/health",
    expected: int = 200,
    every_s: float = _PROBE_EVERY_S,
) -> list[float]:
    """Milliseconds of `path`, asked at fixed times: a late answer also counts for those due meanwhile.

    What this thread itself waited for a processor is no fault of the server and does not count, where the system tells.
    Raises RuntimeError for a status other than `expected`.
    """
    latencies_ms: list[float] = []
    due_at = time.perf_counter()
    while goes_on(latencies_ms) or not latencies_ms:
        waited_ms = _waited_ms()
        time.sleep(max(0.0, due_at - time.perf_counter()))
        answer = client.get(path)
        if answer.status_code != expected:
            raise RuntimeError(f"{path}: {answer.status_code} {answer.text[:200]}")
        own_ms = _waited_ms() - waited_ms
        latencies_ms.append(max(0.0, (time.perf_counter() - due_at) * 1000.0 - own_ms))
        due_at += every_s + own_ms / 1000.0
    return latencies_ms


def _waited_ms() -> float:
    """How long this thread was ready to run and waited for a processor, in all; 0 where the system does not tell."""
    try:
        return int(_SCHEDSTAT.read_text().split()[1]) / 1e6  # time running, time waiting, both nanoseconds
    except OSError:
        return 0.0


def rows(results: Mapping[str, Any]) -> list[dict[str, object]]:
    """How fast uploads are taken, and what others feel of it."""
    return [
        {
            "side": result["side"],
            "kind": result["kind"],
            "pace": result["pace"],
            "realtime_factor": result["worst_realtime_factor"],
            "health_p95_ms": result["worst_health_p95_ms"],
        }
        for result in results["results"]
    ]
