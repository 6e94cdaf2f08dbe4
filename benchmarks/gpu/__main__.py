"""`python -m benchmarks.gpu first --out DIR`: try and measure every fast feature, in under 9 minutes.

Each part runs in a process of its own with a time limit, so that one that hangs or crashes does not stop the others.
`DIR/gpu-first.json` is written after each part. The exit status is 1 if a part failed or ran out of time, or if a
feature differs from the plain path.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch

from benchmarks.goals import read_standings
from benchmarks.gpu import battery, load, times, trace
from benchmarks.gpu.engines import Machine
from benchmarks.gpu.goals import GPU_GOALS
from benchmarks.gpu.results import Results, write_json
from benchmarks.report import describe_environment, hash_sources

NAME = "gpu-first"
_LIMIT_S = 530.0
_LOG_LENGTH = 3000  # characters of a failed part's output


# Each part and the seconds after which it is stopped. What matters most comes first: if the time is not sufficient for
# all parts, the last ones are missing.
PARTS: Mapping[str, tuple[Callable[[Machine, Results], Coroutine[Any, Any, None]], float]] = {
    "battery-small": (partial(battery.measure, name="small"), 70.0),
    "battery-medium": (partial(battery.measure, name="medium"), 90.0),
    "load-small": (partial(load.measure, name="small"), 110.0),
    "times-small": (partial(times.measure, name="small"), 50.0),
    "times-medium": (partial(times.measure, name="medium"), 70.0),
    "load-medium": (partial(load.measure, name="medium"), 130.0),
    "kernels": (trace.measure, 60.0),
    "leak": (load.measure_leak, 50.0),
    "rows": (times.measure_rows, 50.0),
    "battery-open": (partial(battery.measure, name="open"), 70.0),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    options = (parser := _parser()).parse_args(arguments)
    if options.device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"there is no device {options.device}; --device cpu tries this out on tiny models")
    if options.command == "part":
        return _run_part(options)
    options.out.mkdir(parents=True, exist_ok=True)
    about = {"device": str(options.device), "sources_sha256": hash_sources()}
    report: dict[str, Any] = {
        "case": NAME,
        "environment": describe_environment(about),
        "differences": [],
        "results": {},
    }
    ends_at = time.monotonic() + options.limit_s
    for name in options.parts:
        results = _start_part(name, options, limit_s=min(PARTS[name][1], ends_at - time.monotonic()))
        report["results"][name] = results
        report["differences"] += [f"{name}: {what}" for what in results["differences"]]
        write_json(options.out / f"{NAME}.json", report)
        print(f"{name}: {results['state']}", *results["differences"], sep="\n  ", flush=True)
    if options.device.type == "cuda":
        print("\n".join(map(str, read_standings(options.out, GPU_GOALS))))
    return int(any(own["state"] != "done" or own["differences"] for own in report["results"].values()))


def _start_part(name: str, options: argparse.Namespace, *, limit_s: float) -> dict[str, Any]:
    """Run a part in a process of its own. Returns what it stored, also if it had to be stopped."""
    path, log = options.out / f"{name}.json", options.out / f"{name}.log"
    path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.gpu", "part", name, "--out", str(options.out)]
    command += ["--device", str(options.device), "--open-device", options.open_device]
    state = "out of time"
    with log.open("w") as output, suppress(subprocess.TimeoutExpired):
        status = subprocess.run(
            command, stdout=output, stderr=output, timeout=max(limit_s, 0.0), check=False
        ).returncode
        state = "done" if status == 0 else f"failed with status {status}"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"differences": []}
    path.unlink(missing_ok=True)
    return results | {"state": state, "log": log.read_text(errors="replace")[-_LOG_LENGTH:] if state != "done" else ""}


def _run_part(options: argparse.Namespace) -> int:
    machine = Machine(options.device)
    if options.open_device:
        machine = Machine(options.device, open=resolve_name(options.open_device))
    if machine.is_tiny:
        torch.set_num_threads(1)
    results = Results(options.out / f"{options.name}.json")
    try:
        asyncio.run(PARTS[options.name][0](machine, results))
    except Exception as error:  # noqa: BLE001 - the other parts go on
        traceback.print_exc()
        results.record("error", f"{type(error).__name__}: {error}"[:500])
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    first, part = commands.add_parser("first", help="all parts"), commands.add_parser("part", help="one part's process")
    for command in (first, part):
        command.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder of the JSON file")
        command.add_argument("--device", type=torch.device, default="cuda:0", help="cuda:0, or cpu with tiny models")
        command.add_argument("--open-device", default="", help="MODULE:FUNCTION that opens a stand-in for the device")
    first.add_argument("--parts", type=lambda text: text.split(","), default=[*PARTS], help=", ".join(PARTS))
    first.add_argument("--limit-s", type=float, default=_LIMIT_S, help="seconds for all parts together")
    part.add_argument("name", choices=PARTS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
