"""Every case by name: where it is, and how it is run and written. Cases are imported when asked for, because most need
Ray and the web packages.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.cases import run
from benchmarks.cases.run import RunRequest
from benchmarks.compare.pictures import format_comparison, write_plots
from benchmarks.report import write_report
from benchmarks.settings import CaseSettings

MODES = ("strict", "fast")


@dataclass(frozen=True, slots=True)
class Case:
    """`module` of `benchmarks.cases` has `function(settings)`, which returns results, and `rows(results)`, their table.

    `options`: the fields of the settings that it follows. `by_mode`: both modes are measured unless one was asked for.
    `is_bare`: needs neither Ray nor HTTP.
    """

    module: str
    function: str
    options: str
    by_mode: bool = False
    is_bare: bool = False


CASES: Mapping[str, Case] = {
    "engine": Case("engine", "run_engine", "model device mode threads rounds", by_mode=True, is_bare=True),
    "open": Case("open", "run_open_case", "device mode threads rounds", is_bare=True),
    "simulate": Case("simulate", "run_simulate_case", "full", is_bare=True),
    "micro": Case("micro", "run_micro_case", "model device threads rounds full"),
    "ladder": Case("ladder", "run_ladder", "model device mode threads rounds full", by_mode=True, is_bare=True),
    "memory": Case("memory", "run_memory_case", "model device mode threads full", is_bare=True),
    "prompt-cache": Case("prompt_cache", "run_prompt_cache", "model device threads", is_bare=True),
    "http": Case("http", "run_http_case", "model device threads rounds full"),
    "formats": Case("formats", "run_formats_case", "model threads rounds full"),
    "overhead": Case("overhead", "run_overhead_case", "model threads rounds"),
    "uploads": Case("uploads", "run_uploads_case", "model threads rounds"),
    "jobs": Case("jobs", "run_jobs_case", "rounds"),
    "jobs-http": Case("jobs_http", "run_jobs_http_case", "model threads rounds"),
    "batch": Case("batch", "run_batch_case", "model threads rounds"),
    "scale": Case("scale", "run_scale_case", "model threads rounds full"),
    "routing": Case("routing", "run_routing_case", "model threads rounds full"),
    "autoscale": Case("autoscale", "run_autoscale_case", "model threads rounds full"),
    "overload": Case("overload", "run_overload_case", "model threads rounds full"),
    "ingress": Case("ingress", "run_ingress_case", "model threads full"),
    "capacity": Case("capacity", "run_capacity_case", "full", is_bare=True),
    "cold-start": Case("cold_start", "run_cold_start_case", "model device threads rounds"),
    "playground": Case("playground", "run_playground_case", "model threads rounds"),
    "threads": Case("threads", "run_threads_case", "model rounds", is_bare=True),
    "edits": Case("edits", "run_edits_case", "device threads rounds", is_bare=True),
    "bfloat16": Case("bfloat16", "run_bfloat16_case", "rounds", is_bare=True),
}


def measure_case(name: str, settings: CaseSettings, *, out: Path) -> list[dict[str, object]]:
    """Run a case, write a JSON file per mode, return its table."""
    case = CASES[name]
    if not case.by_mode:
        return _measure(case, settings, path=out / f"{name}.json")
    modes = (settings.mode,) if settings.mode else MODES
    tables = [_measure(case, replace(settings, mode=mode), path=out / f"{name}-{mode}.json") for mode in modes]
    return [row for table in tables for row in table]


def measure_comparison(settings: CaseSettings, request: RunRequest, *, out: Path) -> list[dict[str, object]]:
    """The case `run`: JSON, a Markdown table, the lists of arrivals and plots. Raises VoidError, OutOfTimeError."""
    name = f"run-{request.mix}"
    results = asyncio.run(run.run_comparison(settings, request, folder=out / name))
    write_report(out, name, settings=asdict(settings), results=results)
    (out / f"{name}.md").write_text(format_comparison(results))
    if not request.engine_only:  # a machine for that has no matplotlib
        write_plots(out / name, results)
    return run.rows(results)


def _measure(case: Case, settings: CaseSettings, *, path: Path) -> list[dict[str, object]]:
    module = importlib.import_module(f"benchmarks.cases.{case.module}")
    measured = getattr(module, case.function)(settings)
    results: dict[str, Any] = asyncio.run(measured) if inspect.iscoroutine(measured) else measured
    write_report(path.parent, path.stem, settings=asdict(settings), results=results)
    table: list[dict[str, object]] = module.rows(results)
    return table
