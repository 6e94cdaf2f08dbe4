"""Run a server as an operator does: `stable-audio-serve serve`, in a child process."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx

from stable_audio_serve.launcher.environment import is_port_free
from stable_audio_serve.launcher.guard import processes_using
from tests.patience import PATIENCE_S

APPLICATION = "audio"
ON_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # without it, Ray replaces 127.0.0.1
_FIRST_PORT, _LAST_PORT = 32_000, 32_768  # for the tests; the servers' internal processes use lower ports


def _own_ports() -> Iterator[int]:
    """Yield the ports of this test process in random order, again and again. Other test processes have other ports."""
    number, count = os.environ.get("PYTEST_XDIST_WORKER", "gw0"), os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")
    ports = list(range(_FIRST_PORT + int(number.removeprefix("gw")), _LAST_PORT, int(count)))
    random.SystemRandom().shuffle(ports)
    return itertools.cycle(ports)


_PORTS = _own_ports()


def free_port() -> int:
    """Return a free port below 32768. From 32768 on, the kernel gives ports to outgoing connections.

    A port is not returned twice in succession, because nothing may listen on it yet.
    """
    return next(port for port in _PORTS if is_port_free("127.0.0.1", port))


def write_config(folder: Path, args: Mapping[str, Any], **top_level: Any) -> Path:
    application = {
        "name": APPLICATION,
        "route_prefix": "/",
        "import_path": "stable_audio_serve.serving.app:build",
        "args": args,
    }
    path = folder / "serve_config.yaml"
    path.write_text(json.dumps({"applications": [application], **top_level}))  # every JSON file is a YAML file
    return path


def command(config: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "stable_audio_serve.cli", "serve", "--config", str(config), *options]


class LaunchedServer:
    """A server process.

    The constructor starts the process. Call `wait_until_ready` before use, and `stop` or `kill` at the end.
    """

    def __init__(
        self,
        config: Path,
        *options: str,
        host: str = "127.0.0.1",
        environment: Mapping[str, str] | None = None,
        program: Sequence[str] | None = None,
    ) -> None:
        """Start the server.

        `program` is a command to run in place of `stable-audio-serve serve`, in the same folder.
        """
        self.port = free_port()
        self.url = f"http://{host}:{self.port}"
        self.lines: list[str] = []
        self._started_at = time.monotonic()
        self._ready = threading.Event()
        self.start_s: float | None = None
        self.probes: list[tuple[httpx.Response, int]] = []
        self.process = subprocess.Popen(
            [*(program or command(config)), "--host", host, "--port", str(self.port), *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=config.parent,
            env=os.environ | {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"} | (environment or {}),
            start_new_session=True,  # so that `signal` can send Ctrl-C to the whole process group
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def output(self) -> str:
        return "".join(self.lines)

    def wait_until_ready(self) -> LaunchedServer:
        assert self._ready.wait(PATIENCE_S), self.output
        assert self.process.poll() is None, self.output
        self.client = httpx.Client(base_url=self.url, timeout=PATIENCE_S)
        assert self.directory
        return self

    @cached_property
    def directory(self) -> Path:
        """The server's private folder, which stays known after its end. Raises ValueError if there is none yet."""
        (directory,) = {Path(path) for path in self._open_files() if re.fullmatch(r"/tmp/sas-[^/]+", path)}
        return directory

    def stop(self, *, number: int = signal.SIGINT) -> float:
        """Send a signal and wait until the server has ended. Return the seconds that this took."""
        started_at = time.monotonic()
        self.signal(number)
        self.wait_until_stopped()
        return time.monotonic() - started_at

    def signal(self, number: int) -> None:
        """Send SIGINT or SIGHUP to the whole process group, as a terminal does on Ctrl-C or when it closes.

        Other signals are sent to the main process only.
        """
        if number in {signal.SIGINT, signal.SIGHUP}:
            os.killpg(self.process.pid, number)
        else:
            self.process.send_signal(number)

    def wait_until_stopped(self) -> None:
        self.process.wait(timeout=PATIENCE_S)
        self._reader.join(timeout=PATIENCE_S)

    def wait_for_output(self, text: str) -> None:
        """Wait until the server has printed a line with `text`. Ray prints lines of its processes with a delay."""
        deadline = time.monotonic() + PATIENCE_S
        while text not in self.output:
            assert time.monotonic() < deadline, self.output
            time.sleep(0.05)

    def leftovers(self) -> Sequence[int]:
        """Return the ids of processes that still use this server's folder. After the server's end, there are none."""
        return processes_using(self.directory)

    def pids(self, title: str) -> list[int]:
        """Return the ids of this server's processes whose command line contains `title`."""
        return [pid for pid in processes_using(self.directory) if title in _read_process(pid, "cmdline")]

    @contextmanager
    def suspended(self, title: str) -> Iterator[None]:
        """Within this context, suspend (SIGSTOP) the processes whose command line contains `title`."""
        pids = self.pids(title)
        assert pids
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    def num_requests(self, model: str) -> int:
        """Return the number of unfinished requests of a model, as its replicas reported it in the last seconds."""
        replicas = self.client.get("/v1/status").json()["models"][model]["replicas"]
        return sum(replica["requests"] or 0 for replica in replicas)

    def deployment_settings(self) -> dict[str, Any]:
        """Return Ray Serve's settings of each deployment."""
        with self.look_inside("tests.serving.deployment_settings") as program:
            settings: dict[str, Any] = json.loads(program.communicate()[0])
        return settings

    def ray(self) -> tuple[str, str]:
        """Return the address and the secret token of the server's Ray."""
        (pid,) = self.pids("/raylet/raylet ")
        address = re.search(r"gcs-address=([\d.:]+)", _read_process(pid, "cmdline"))
        token = re.search(r"RAY_AUTH_TOKEN=(\w+)", _read_process(pid, "environ"))
        assert address is not None
        assert token is not None
        return address[1], token[1]

    def look_inside(self, program: str, *arguments: str) -> subprocess.Popen[str]:
        """Start a Python module as a program that connects to this server's Ray.

        Its arguments are Ray's address, the application's name and `arguments`.
        """
        address, token = self.ray()
        return subprocess.Popen(
            [sys.executable, "-m", program, address, APPLICATION, *arguments],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token} | ON_LOOPBACK,
        )

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if line.startswith("  curl "):
                self.start_s = time.monotonic() - self._started_at
                self._ready.set()
        self._ready.set()

    def _open_files(self) -> set[str]:
        folder = Path(f"/proc/{self.process.pid}/fd")
        links = (os.readlink(link) for link in folder.iterdir())
        return {"/".join(link.split("/")[:3]) for link in links}


def _read_process(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
