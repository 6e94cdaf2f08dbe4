"""`python -m benchmarks.gpu first --out DIR`: try and measure every fast feature, in under 9 minutes.

Each part runs in a process of its own with a time limit, so that a part that hangs or crashes does not stop the others.
`DIR/gpu-first.json` is written after each part. The exit status is 1 if a part failed or ran out of time, or if a
feature differs from the plain path.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch

from benchmarks.goals import GPU_GOALS, read_standings
from benchmarks.gpu import battery, load, times, trace
from benchmarks.gpu.engines import Machine
from benchmarks.gpu.results import Results
from benchmarks.report import describe_environment, hash_sources, write_json

_NAME, _LIMIT_S, _END_S = "gpu-first", 530.0, 10.0
# The forkserver process imports these modules once, before it starts the parts' processes. It does not use the device.
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["benchmarks.gpu.cli", "transformers"])
_OPTIONAL = ("adapters", "compiled")
_LOG_LENGTH = 3000  # characters of a failed part's output
# Each part and the seconds after which it is stopped. The most important parts come first, because the last parts are
# missing if the time is not sufficient for all. `_OPTIONAL` are measured only if `--parts` names them.
PARTS: Mapping[str, tuple[Callable[[Machine, Results], Coroutine[Any, Any, None]], float]] = {
    "battery-small": (partial(battery.measure, name="small"), 70.0),
    "battery-medium": (partial(battery.measure, name="medium"), 90.0),
    "start": (battery.measure_start, 60.0),
    "load-small": (partial(load.measure, name="small"), 110.0),
    "times-small": (partial(times.measure, name="small"), 60.0),
    "times-medium": (partial(times.measure, name="medium"), 80.0),
    "load-medium": (partial(load.measure, name="medium"), 130.0),
    "rows": (times.measure_rows, 50.0),
    "decoders": (times.measure_decoders, 60.0),
    "leak": (load.measure_leak, 50.0),
    "battery-open": (partial(battery.measure, name="open"), 70.0),
    "kernels": (trace.measure, 60.0),
    "adapters": (times.measure_adapters, 40.0),
    "compiled": (times.measure_compiled, 120.0),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    options = (parser := _parser()).parse_args(arguments)
    if options.device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"there is no device {options.device}; --device cpu tries this out on tiny models")
    options.out.mkdir(parents=True, exist_ok=True)
    about = describe_environment({"device": str(options.device), "sources_sha256": hash_sources()})
    report: dict[str, Any] = {"case": _NAME, "environment": about, "differences": [], "results": {}}
    ends_at = time.monotonic() + options.limit_s
    for name in options.parts:
        own_limit_s = PARTS[name][1] if options.device.type == "cuda" else float("inf")
        results = _run_part(name, options, limit_s=min(own_limit_s, ends_at - time.monotonic()))
        report["results"][name] = results
        report["differences"] += [f"{name}: {what}" for what in results["differences"]]
        write_json(options.out / f"{_NAME}.json", report)
        print(f"{name}: {results['state']}", *results["differences"], sep="\n  ", flush=True)
    if options.device.type == "cuda":
        print("\n".join(map(str, read_standings(options.out, GPU_GOALS))))
    return int(any(own["state"] != "done" or own["differences"] for own in report["results"].values()))


def _run_part(name: str, options: argparse.Namespace, *, limit_s: float) -> dict[str, Any]:
    """Run a part in a process of its own. Returns the results that it stored, even if it had to be stopped."""
    path, log = options.out / f"{name}.json", options.out / f"{name}.log"
    path.unlink(missing_ok=True)
    state = "out of time"
    if limit_s > 0:
        process = _PROCESSES.Process(target=_measure, args=(name, options, path, log))
        process.start()
        process.join(limit_s)
        if process.exitcode is not None:
            state = "done" if process.exitcode == 0 else f"failed with status {process.exitcode}"
        process.kill()
        process.join(_END_S)
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"differences": []}
    path.unlink(missing_ok=True)
    is_fine = not log.exists() or (state == "done" and not results["differences"])
    return results | {"state": state, "log": "" if is_fine else log.read_text(errors="replace")[-_LOG_LENGTH:]}


def _measure(name: str, options: argparse.Namespace, path: Path, log: Path) -> None:  # noqa: PLR0917
    """Measure one part in this process. An error ends the process with status 1."""
    with log.open("w") as output:
        os.dup2(output.fileno(), 1), os.dup2(output.fileno(), 2)
    own = {"open": resolve_name(options.open_device)} if options.open_device else {}
    machine = Machine(options.device, **own)
    torch.set_num_threads(1 if machine.is_tiny else torch.get_num_threads())
    asyncio.run(PARTS[name][0](machine, Results(path)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("run", choices=["first"], help="the first run on a machine")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder of the JSON file")
    parser.add_argument("--device", type=torch.device, default="cuda:0", help="cuda:0, or cpu with tiny models")
    parser.add_argument("--open-device", default="", help="MODULE:FUNCTION that opens a stand-in for the device")
    usual = [name for name in PARTS if name not in _OPTIONAL]
    parser.add_argument("--parts", type=lambda text: text.split(","), default=usual, help=", ".join(PARTS))
    parser.add_argument("--limit-s", type=float, default=_LIMIT_S, help="seconds for all parts together")
    return parser
