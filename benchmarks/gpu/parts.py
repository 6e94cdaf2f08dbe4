"""The parts of the first run, and the process that runs one of them."""

from __future__ import annotations

import argparse
import asyncio
import os
from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch

from benchmarks.gpu import battery, load, times, trace
from benchmarks.gpu.engines import Machine
from benchmarks.gpu.results import Results

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


def measure(name: str, options: argparse.Namespace, path: Path, log: Path) -> None:  # noqa: PLR0917
    """Measure one part in this process; an error ends it with status 1."""
    with log.open("w") as output:
        os.dup2(output.fileno(), 1), os.dup2(output.fileno(), 2)
    own = {"open": resolve_name(options.open_device)} if options.open_device else {}
    machine = Machine(options.device, **own)
    torch.set_num_threads(1 if machine.is_tiny else torch.get_num_threads())
    asyncio.run(PARTS[name][0](machine, Results(path)))
