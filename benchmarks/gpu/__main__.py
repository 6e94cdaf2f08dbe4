"""`python -m benchmarks.gpu --part N --out DIR`: measure one part, or all, on the first CUDA device; start it again to
continue. STABLE_AUDIO_TEST_DEVICE=cpu tries everything out on tiny checkpoints.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.goals import read_standings
from benchmarks.gpu.goals import GPU_GOALS
from benchmarks.gpu.parts import PARTS
from benchmarks.gpu.record import Record
from benchmarks.gpu.subjects import Bench
from benchmarks.gpu.tracing import prepare
from benchmarks.report import describe_environment, hash_sources

_BUDGET_S = 450.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0, also when something is left; 1 if a measurement failed; 2 for files of another commit or device."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(1 if options.device.type == "cpu" else torch.get_num_threads())
    prepare(options.device)
    has_failed = False
    for number in [options.part] if options.part else PARTS:
        bench = Bench.on(options.device)
        part = PARTS[number]
        environment = describe_environment(
            {"device": str(options.device), "models_are_tiny": bench.is_tiny, "sources_sha256": hash_sources()}
        )
        try:
            record = Record(options.out / f"gpu-{number}-{part.name}.json", environment=environment)
        except ValueError as error:
            print(error, file=sys.stderr)
            return 2
        print(f"part {number}, {part.name}", flush=True)
        try:
            left = record.run(
                part.measurements(bench, record.done),
                summarize=part.summarize,
                budget_s=options.budget_s,
                say=_SayWithTime(),
            )
        finally:
            bench.close()
        has_failed |= bool(record.failed)
        if left:
            print(f"part {number}: time is up; start it again for {', '.join(left)}")
    if options.device.type == "cuda":
        print("\n".join(str(standing) for standing in read_standings(options.out, GPU_GOALS)))
    return int(has_failed)


class _SayWithTime:
    def __init__(self) -> None:
        self._started_at = time.monotonic()

    def __call__(self, line: str) -> None:
        print(f"  {time.monotonic() - self._started_at:6.1f} s  {line}", flush=True)


def _device(name: str) -> torch.device:
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError(f"there is no device {name}; STABLE_AUDIO_TEST_DEVICE=cpu tries this out")
    return device


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
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
