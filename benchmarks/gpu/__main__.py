"""`python -m benchmarks gpu --part N --out DIR`: measures one part, or all, on the first CUDA device. To continue an
interrupted measurement, run the command again. With STABLE_AUDIO_TEST_DEVICE=cpu everything runs on tiny checkpoints.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.goals import read_standings
from benchmarks.gpu import busy, lone, mixes, precision
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.goals import GPU_GOALS
from benchmarks.gpu.trace import trace
from benchmarks.pieces import OtherRunError, Pieces
from benchmarks.report import describe_environment, hash_sources, write_report

_BUDGET_S = 450.0
_Measure = Callable[[Bench, Pieces], Awaitable[dict[str, Any]]]
PARTS: Mapping[int, tuple[str, _Measure]] = {
    1: ("lone", lone.measure),
    2: ("busy", busy.measure),
    3: ("small", partial(mixes.measure, mixes=mixes.SMALL)),
    4: ("medium", partial(mixes.measure, mixes=mixes.MEDIUM)),
    5: ("precision", precision.measure),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and return the exit status.

    1: a measurement failed. 2: existing files are from another commit or device. 0: otherwise, even if the time was not
    sufficient for all measurements.
    """
    options = _parser().parse_args(arguments)
    torch.set_num_threads(1 if options.device.type == "cpu" else torch.get_num_threads())
    try:
        has_failed = [asyncio.run(_run(number, options)) for number in ([options.part] if options.part else PARTS)]
    except OtherRunError as error:
        print(error, file=sys.stderr)
        return 2
    if options.device.type == "cuda":
        print("\n".join(map(str, read_standings(options.out, GPU_GOALS))))
    return int(any(has_failed))


async def _run(number: int, options: argparse.Namespace) -> bool:
    """Measure one part and write its file. Returns whether a measurement failed."""
    bench, (part, measure) = Bench(options.device), PARTS[number]
    name = f"gpu-{number}-{part}"
    about = {"device": str(options.device), "models_are_tiny": bench.is_tiny, "sources_sha256": hash_sources()}
    environment = describe_environment(about)
    same = about | {key: environment[key] for key in ("gpu", "cpu", "versions")}
    pieces = Pieces(options.out / name, same, ends_at=time.monotonic() + options.budget_s)
    print(f"part {number}, {part}", flush=True)
    await trace(options.device, partial(asyncio.sleep, 0.0))  # load the profiler now, because that takes time
    try:
        results = await measure(bench, pieces)
    finally:
        await bench.drop()
    results |= {"left": pieces.left, "failed": pieces.failed}
    write_report(options.out, name, settings=about, results=results)
    if pieces.left:
        print(f"part {number}: time is up; start it again for {', '.join(pieces.left)}")
    return bool(pieces.failed)


def _device(name: str) -> torch.device:
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError(f"there is no device {name}; STABLE_AUDIO_TEST_DEVICE=cpu tries this out")
    return device


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu", description=__doc__)
    parser.add_argument("--part", type=int, choices=PARTS, help="all of them without")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder of the JSON files")
    parser.add_argument(
        "--device", type=_device, default=os.environ.get("STABLE_AUDIO_TEST_DEVICE", "cuda:0"), help="cuda:0, or cpu"
    )
    parser.add_argument(
        "--budget-s", type=float, default=_BUDGET_S, help="seconds for a part, after which it stops with what it has"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
