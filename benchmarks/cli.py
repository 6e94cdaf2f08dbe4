"""`python -m benchmarks {engine,all} --out DIR`: run cases, write one JSON file each, print the ratios."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.engine_case import EngineSettings, load, run_engine_case
from benchmarks.report import format_table, write_report


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse and run."""
    options = _parser().parse_args(arguments)
    run_engine(options)


def run_engine(options: argparse.Namespace) -> None:
    """Both modes unless one was asked for."""
    rows = []
    for mode in [options.mode] if options.mode else ["strict", "fast"]:
        settings = EngineSettings(options.model, options.device, mode, options.threads, options.rounds)
        results = asyncio.run(run_engine_case(load(settings), settings))
        path = write_report(options.out, f"engine-{mode}", settings=asdict(settings), results=results)
        rows.append(
            {
                "case": f"engine-{mode}",
                "model": results["model"]["name"],
                "throughput_ratio": results["throughput_ratio"],
                "cpu_time_ratio": results["cpu_time_ratio"],
                "mean_latency_ratio": results["mean_latency_ratio"],
                "largest_difference": f"{results['largest_difference']:.1e}",
                "file": path,
            }
        )
    print(format_table(rows))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("case", choices=("engine", "all"))
    parser.add_argument("--out", type=Path, default=Path("bench-results"), help="folder for the JSON files")
    parser.add_argument("--model", help="registered name or checkpoint folder; default: the demo model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--mode", choices=("strict", "fast"), help="default: both")
    parser.add_argument("--threads", type=int, default=1, help="model threads")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--engine-only", action="store_true", help="only what runs without Ray and HTTP")
    return parser
