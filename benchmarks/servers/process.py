"""Runs this project's server as a child process, which is started with `serve` and stopped with Ctrl-C."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from benchmarks.dialects import OverHttp, open_clients
from benchmarks.load import family
from stable_audio_serve.models.registry import ModelEntry

_READY_TIMEOUT_S = 300.0
_STOP_TIMEOUT_S = 30.0
_IN_PROGRESS = 10_000  # value of all limits on requests in progress, so high that no burst is refused
_COLD_START = re.compile(r"^cold start:.*\bray ([0-9.]+) s.*\n", re.MULTILINE)  # log line of a ready server


@dataclass(frozen=True, slots=True)
class Server:
    """A running server. `ready_s` is the time from the start of its process to its first healthy response.

    `ray_s` is the part of this time in which Ray started, as the server's log says.
    """

    url: str
    ready_s: float
    ray_s: float


def write_config(
    folder: Path,
    entry: ModelEntry,
    *,
    threads: int,
    import_path: str = "stable_audio_serve.serving.app:build",
    deployments: Sequence[Mapping[str, object]] = (),
    **args: object,
) -> Path:
    """Write a Ray Serve config file for one model with one replica. Returns the path of the file.

    `args` adds or replaces arguments of the application. `deployments` has the same meaning as in Ray Serve: it
    overrides options of the application's deployments.
    """
    model = {"name": entry.card.name, "threads": threads, "replicas": {"max_replicas": 1}}
    if not entry.card.is_demo:
        model |= _source(entry)
    application = {
        "name": "benchmark",
        "route_prefix": "/",
        "import_path": import_path,
        "args": {"models": [model], "output_dir": str(folder / "outputs"), **args},
        "deployments": list(deployments),
    }
    path = folder / "serve_config.yaml"
    path.write_text(yaml.safe_dump({"applications": [application]}))
    return path


def _source(entry: ModelEntry) -> dict[str, object]:
    return {"path": str(Path(entry.folder).resolve())} if entry.folder else {"repo_id": entry.repo_id}


@asynccontextmanager
async def serving(
    entry: ModelEntry, names: Mapping[str, Mapping[str, object]], *, threads: int, **args: Any
) -> AsyncIterator[Mapping[str, OverHttp]]:
    """Run a server that has one model under several names. `names` has additional settings for each name.

    `args` has the same meaning as for `write_config`. Yields a client for each name when all replicas are ready. Only
    the queues of the models refuse requests: the server's other limits are too high for that.
    """
    one = {**_source(entry), "threads": threads, "replicas": {"min_replicas": 1, "max_replicas": 1}}
    models: list[dict[str, Any]] = [{"name": name, **one, **own} for name, own in names.items()]
    ingress = {"max_ongoing_requests": _IN_PROGRESS}
    with tempfile.TemporaryDirectory() as folder:
        path = write_config(Path(folder), entry, threads=threads, models=models, ingress=ingress, **args)
        with running_server(path) as server:
            _wait_for_replicas(server, {model["name"]: model["replicas"]["min_replicas"] for model in models})
            async with open_clients(server.url) as clients:
                yield {name: OverHttp(clients, model=name) for name in names}


@contextmanager
def running_server(config: Path) -> Iterator[Server]:
    """Start a server, wait until it is ready, and stop it with Ctrl-C at the end of the context.

    Raises RuntimeError with the server's output if the server does not become ready.
    """
    port, log = _free_port(), config.with_suffix(".log")
    command = ("-m", "stable_audio_serve.cli", "serve", "--config", str(config), "--port", str(port))
    path = os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH"))))
    started_at = time.perf_counter()
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, *command],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": path},
        )
    try:
        while not (ready := _COLD_START.search(log.read_text(errors="replace"))):
            if process.poll() is not None or time.perf_counter() > started_at + _READY_TIMEOUT_S:
                last_lines = log.read_text(errors="replace").splitlines()[-30:]
                raise RuntimeError("the server did not start:\n" + "\n".join(last_lines))
            time.sleep(0.02)
        yield Server(f"http://127.0.0.1:{port}", time.perf_counter() - started_at, ray_s=float(ready[1]))
    finally:
        _stop(process)


def _wait_for_replicas(server: Server, counts: Mapping[str, int]) -> None:
    """Wait until every model has the number of replicas in `counts`. Raises RuntimeError if that takes too long."""
    ends_at = time.monotonic() + _READY_TIMEOUT_S
    while True:
        models = httpx.get(f"{server.url}/health", trust_env=False).raise_for_status().json()["models"]
        missing = [name for name, count in counts.items() if models[name]["num_replicas"] < count]
        if not missing:
            return
        if time.monotonic() > ends_at:
            raise RuntimeError(f"not all replicas of {missing} came up within {_READY_TIMEOUT_S:.0f} s")
        time.sleep(0.5)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Stop the server as Ctrl-C does, and then kill its remaining processes."""
    processes = family(process.pid)
    process.send_signal(signal.SIGINT)
    try:
        with suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_TIMEOUT_S)
    finally:
        for left in (*processes, *family(process.pid)):
            with suppress(psutil.Error):
                left.kill()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
