"""`python -m benchmarks CASE --out DIR`: run one case or all, write one JSON file each, print the ratios.

Only the engine case runs without Ray and the web packages, so the others are imported when asked for.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.cases.engine import load, run_engine_case
from benchmarks.cases.run import DIALECT_NAMES, RunRequest, run_comparison
from benchmarks.compare.outputs import VoidError
from benchmarks.compare.pictures import write_plots, write_table
from benchmarks.compare.run import OutOfTimeError
from benchmarks.report import format_table, write_report
from benchmarks.settings import CaseSettings
from benchmarks.sides.servers import SIDES
from benchmarks.workload import MIXES

MODES = ("strict", "fast")


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse and run."""
    options = _parser().parse_args(arguments)
    settings = CaseSettings(
        options.model, options.device, options.mode, options.threads, options.rounds, full=options.full
    )
    if options.case == "run":
        request = _run_request(options)
        try:
            print(format_table(run_run(settings, options.out, request=request)))
        except (VoidError, OutOfTimeError, ValueError) as error:
            raise SystemExit(str(error)) from error
        return
    wanted = tuple(_CASES) if options.case == "all" else (options.case,)
    for name in ("engine", "open") if options.engine_only else wanted:
        print(f"\n{name}")
        print(format_table(_CASES[name](settings, options.out)))


def run_engine(settings: CaseSettings, out: Path) -> list[dict[str, object]]:
    """Both modes unless one was asked for."""
    rows: list[dict[str, object]] = []
    for mode in [settings.mode] if settings.mode else MODES:
        chosen = replace(settings, mode=mode)
        results = asyncio.run(run_engine_case(load(chosen), chosen))
        path = _write(out, f"engine-{mode}", settings=chosen, results=results)
        rows.append(
            {
                "mode": mode,
                "model": results["model"]["card"]["name"],
                "throughput_ratio": results["throughput_ratio"],
                "cpu_time_ratio": results["cpu_time_ratio"],
                "mean_latency_ratio": results["mean_latency_ratio"],
                "largest_difference": f"{results['largest_difference']:.1e}",
                "file": path,
            }
        )
    return rows


def run_ladder(settings: CaseSettings, out: Path) -> list[dict[str, object]]:
    """More in flight, longer clips, many requests: both modes unless one was asked for; memory once."""
    from benchmarks.cases.ladder import run_ladder_case
    from benchmarks.cases.memory import run_memory_case

    rows: list[dict[str, object]] = []
    memory = run_memory_case(settings)
    _write(out, "ladder-memory", settings=settings, results=memory)
    for mode in [settings.mode] if settings.mode else MODES:
        chosen = replace(settings, mode=mode)
        results = asyncio.run(run_ladder_case(load(chosen), chosen))
        path = _write(out, f"ladder-{mode}", settings=chosen, results=results)
        rows.append(
            {
                "mode": mode,
                "in_flight": results["concurrency_in_flight"],
                "throughput": results["concurrency_throughput_ratio"],
                "scheduler_share": results["scheduler_share_of_step"],
                "active": results["scheduler_active_rows"],
                "scheduler_growth": results["scheduler_many_over_few_active_ratio"],
                "4x_frames": results["duration_4x_frames_time_ratio"],
                "rss_growth": memory["memory_rss_growth_share"],
                "file": path,
            }
        )
    return rows


def run_open(settings: CaseSettings, out: Path) -> list[dict[str, object]]:
    """The same for Stable Audio Open, and the share of noise in a long request."""
    from benchmarks.cases.open import run_open_case

    results = asyncio.run(run_open_case(settings))
    path = _write(out, "open", settings=settings, results=results)
    return [
        {
            "mode": results["mode"],
            "throughput_ratio": results["throughput_ratio"],
            "mean_latency_ratio": results["mean_latency_ratio"],
            "largest_difference": f"{results['largest_difference']:.1e}",
            "noise_share": f"{results['worst_noise_share']:.4f}",
            "file": path,
        }
    ]


def run_run(settings: CaseSettings, out: Path, *, request: RunRequest) -> list[dict[str, object]]:
    """Our server against what people would run instead."""
    name = f"run-{request.mix}"
    results = asyncio.run(run_comparison(settings, request, folder=out / name))
    path = _write(out, name, settings=settings, results=results)
    write_table(out / f"{name}.md", results)
    if not request.engine_only:
        write_plots(out / name, results)
    return [
        {
            "side": side,
            "capacity_rps": median(figures["capacity_rps"]),
            **{f"p95_ms {steps}": latency["p95_ms"] for steps, latency in figures["latency"].items()},
            "goodput_rps": (figures["goodput"] or {}).get("good_rps", ""),
            "file": path,
        }
        for side, figures in results["sides"].items()
    ]


def run_simulate(settings: CaseSettings, out: Path) -> list[dict[str, object]]:
    """The engine's scheduling on a model of an H200: ratios by mix, then the shapes of a day."""
    from benchmarks.cases.simulate import run_simulate_case

    results = run_simulate_case(settings)
    path = _write(out, "simulate", settings=settings, results=results)
    return [
        {
            "mix": mix,
            "batching": batching,
            "capacity_over_lock": figures[batching]["capacity_over_lock_ratio"],
            "capacity_over_static": figures[batching]["capacity_over_static_ratio"],
            "p95_over_lock": figures[batching]["p95_over_lock_ratio"],
            "p95_8_over_lock": figures[batching].get("p95_8_over_lock_ratio", ""),
            "shapes_of_a_day": results["days"].get(mix, {}).get("num_shapes", ""),
            "file": path,
        }
        for mix, figures in results["mixes"].items()
        for batching in ("grid", "packed")
    ]


def run_micro(settings: CaseSettings, out: Path) -> list[dict[str, object]]:
    """The parts of a step by themselves, and what can be counted without a GPU."""
    from benchmarks.cases.micro import run_micro_case

    results = run_micro_case(settings)
    path = _write(out, "micro", settings=settings, results=results)
    return [
        {
            "pick_256_us": results["scheduler_pick_us"]["256"],
            "pick_256_over_32": results["scheduler_256_over_32_active_ratio"],
            "pick_share_of_step": results["scheduler_share_of_captured_step"],
            "copies_per_step": results["host_blocking_copies_per_step"],
            "waits_per_step": results["host_waits_per_step"],
            "mix_ups": results["host_mix_ups"],
            **{f"launches_per_layer_{name}": count for name, count in results["launches_per_layer"].items()},
            "file": path,
        }
    ]


def run_http(settings: CaseSettings, out: Path) -> list[dict[str, object]]:
    """What the way to the engine costs."""
    from benchmarks.cases.http import run_http_case

    results = asyncio.run(run_http_case(settings))
    path = _write(out, "http", settings=settings, results=results)
    return [
        {
            "clip_s": results["clip_s"],
            **{f"{way}_ms": results[way]["p50_ms"] for way in ("bare", "engine", "http")},
            "engine_over_bare": results["engine_over_bare_ratio"],
            "http_over_bare": results["http_over_bare_ratio"],
            "http_over_engine": results["http_over_engine_ratio"],
            "added_ms": results["added_ms"]["worst_round_median"],
            "of_it_encode_ms": results["encode_ms"],
            "file": path,
        }
    ]


def run_formats(settings: CaseSettings, out: Path) -> list[dict[str, object]]:
    """What encoding files costs those who wait for the model."""
    from benchmarks.cases.formats import run_formats_case

    results = run_formats_case(settings)
    path = _write(out, "formats", settings=settings, results=results)
    return [
        {
            "mp3_over_wav_step_rate": results["mp3_over_wav_step_rate_ratio"],
            "event_loop_stall_p99_ms": results["event_loop_stall_p99_ms"],
            "health_p99_ms": results["health_p99_ms"],
            "answers_checked": results["answers_checked"],
            "file": path,
        }
    ]


def run_prompt_cache(settings: CaseSettings, out: Path) -> list[dict[str, object]]:
    """How often the text encoder runs."""
    from benchmarks.cases.prompt_cache import run_prompt_cache_case

    results = asyncio.run(run_prompt_cache_case(load(settings), settings))
    path = _write(out, "prompt-cache", settings=settings, results=results)
    return [
        {
            "prompts": results["prompts"],
            "text_encodes_over_distinct": results["text_encodes_over_distinct_prompts_ratio"],
            "warm_prompts_with_identical_audio": results["warm_prompts_with_identical_audio"],
            "file": path,
        }
    ]


def run_overhead(settings: CaseSettings, out: Path) -> list[dict[str, object]]:
    """What everything around the engine costs, by dialect."""
    from benchmarks.cases.overhead import run_overhead_case

    results = run_overhead_case(settings)
    path = _write(out, "overhead", settings=settings, results=results)
    return [
        {
            "route": name,
            "app_p50_ms": route["worst_round_p50_ms"]["app"],
            "serve_p50_ms": route["worst_round_p50_ms"]["serve"],
            "target_ms": route["target_p50_ms"],
            "serve_over_app": route["serve_over_app_ratio"],
            "file": path,
        }
        for name, route in results["routes"].items()
    ]


def run_uploads(settings: CaseSettings, out: Path) -> list[dict[str, object]]:
    """How fast uploads are taken, and what others feel of it."""
    from benchmarks.cases.uploads import run_uploads_case

    results = run_uploads_case(settings)
    path = _write(out, "uploads", settings=settings, results=results)
    return [
        {
            "side": result["side"],
            "kind": result["kind"],
            "pace": result["pace"],
            "realtime_factor": result["worst_realtime_factor"],
            "health_p95_ms": result["worst_health_p95_ms"],
            "file": path,
        }
        for result in results["results"]
    ]


def run_jobs(settings: CaseSettings, out: Path) -> list[dict[str, object]]:
    """What keeping a job costs, by database."""
    from benchmarks.cases.jobs import run_jobs_case

    results = run_jobs_case(settings)
    path = _write(out, "jobs", settings=settings, results=results)
    return [
        {
            "database": name,
            "submit_p50_ms": figures["worst_submit_p50_ms"],
            "submit_p95_ms": figures["worst_submit_p95_ms"],
            "lease_p95_ms": figures["worst_lease_p95_ms"],
            "long_over_short": figures["worst_lease_long_over_short_ratio"],
            "reads_per_s": figures["worst_reads_per_s"],
            "file": path,
        }
        for name, figures in results["databases"].items()
    ]


def run_jobs_http(settings: CaseSettings, out: Path) -> list[dict[str, object]]:
    """How fast jobs are accepted, and what asking about them costs."""
    from benchmarks.cases.jobs_http import run_jobs_http_case

    results = run_jobs_http_case(settings)
    path = _write(out, "jobs-http", settings=settings, results=results)
    figures = {
        "poll_p95_ms": results["worst_poll_p95_ms"],
        "engine_polled_over_quiet": results["engine_polled_over_quiet_ratio"],
        "queries_per_s_and_idle_runner": results["queries_per_s_and_idle_runner"],
    }
    for pace, p50_ms in results["worst_submit_p50_ms"].items():
        figures |= {f"submit_p50_ms {pace}": p50_ms, f"status_p95_ms {pace}": results["worst_status_p95_ms"][pace]}
    return [{"figure": name, "value": value, "file": path} for name, value in figures.items()]


def run_batch(settings: CaseSettings, out: Path) -> list[dict[str, object]]:
    """What somebody who waits feels of another client's batch jobs, and what those lose by it."""
    from benchmarks.cases.batch import run_batch_case

    results = run_batch_case(settings)
    path = _write(out, "batch", settings=settings, results=results)
    return [
        {
            "alone_s": run["alone_s"],
            "behind_s": run["behind_s"],
            "ratio": run["behind_s"] / run["alone_s"],
            "jobs_alone_s": run["jobs_alone_s"],
            "jobs_beside_s": run["jobs_beside_s"],
            "file": path,
        }
        for run in results["rounds"]
    ]


def run_threads(settings: CaseSettings, out: Path) -> list[dict[str, object]]:
    """What a second CPU thread is worth at the official size."""
    from benchmarks.cases.threads import run_threads_case

    results = run_threads_case(settings)
    path = _write(out, "threads", settings=settings, results=results)
    return [
        {"threads": count, "work_s_per_audio_s": value, "speedup": results["speedup"][count], "file": path}
        for count, value in results["work_s_per_audio_s"].items()
    ]


def run_scale(settings: CaseSettings, out: Path) -> list[dict[str, object]]:
    """What more replicas are worth, on stand-ins and on the model."""
    from benchmarks.cases.scale import run_scale_case

    results = run_scale_case(settings)
    path = _write(out, "scale", settings=settings, results=results)
    return [
        {
            "side": side,
            "replicas": count,
            "requests": results[side]["requests"][count],
            "capacity_over_one": ratio,
            "target": results["target_capacity_over_one"][side].get(count, ""),
            "cpu_ms_per_request": results[side]["worst_cpu_ms_per_request"][count],
            "file": path,
        }
        for side in ("stand_in", "model")
        for count, ratio in results[side]["worst_capacity_over_one"].items()
    ]


def run_overload(settings: CaseSettings, out: Path) -> list[dict[str, object]]:
    """What a server still does at three times its capacity."""
    from benchmarks.cases.overload import run_overload_case

    results = run_overload_case(settings)
    path = _write(out, "overload", settings=settings, results=results)
    return [
        {
            "side": side,
            "goodput_over_peak": results[side]["worst_goodput_over_peak_ratio"],
            "finished_over_peak": results[side]["worst_finished_over_peak_ratio"],
            "refusal_p99_ms": results[side]["worst_refusal_p99_ms"],
            "normal_after_s": results[side]["worst_normal_after_s"],
            "other_answers": results[side]["other_answers"],
            "file": path,
        }
        for side in ("model", "stand_in")
    ]


def run_cold_start(settings: CaseSettings, out: Path) -> list[dict[str, object]]:
    """From the command to the first audio."""
    from benchmarks.cases.cold_start import run_cold_start_case

    results = run_cold_start_case(settings)
    path = _write(out, "cold-start", settings=settings, results=results)
    return [
        {
            "ready_s": results["ready_s"],
            "first_audio_s": results["first_audio_s"],
            "ratio": results["first_audio_over_ray_plus_bare_ratio"],
            "stages_s": results["stages_s"],
            "file": path,
        }
    ]


_CASES: dict[str, Callable[[CaseSettings, Path], list[dict[str, object]]]] = {
    "engine": run_engine,
    "open": run_open,
    "simulate": run_simulate,
    "ladder": run_ladder,
    "micro": run_micro,
    "http": run_http,
    "formats": run_formats,
    "prompt-cache": run_prompt_cache,
    "overhead": run_overhead,
    "uploads": run_uploads,
    "jobs": run_jobs,
    "jobs-http": run_jobs_http,
    "batch": run_batch,
    "scale": run_scale,
    "overload": run_overload,
    "cold-start": run_cold_start,
    "threads": run_threads,
}


def _write(out: Path, name: str, *, settings: CaseSettings, results: dict[str, Any]) -> Path:
    return write_report(out, name, settings=asdict(settings), results=results)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("case", choices=("run", *_CASES, "all"))
    parser.add_argument("--out", type=Path, default=Path("bench-results"), help="folder for the JSON files")
    parser.add_argument("--model", help="registered name or checkpoint folder; default: the demo model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--mode", choices=MODES, help="default: both")
    parser.add_argument("--threads", type=int, default=1, help="model threads")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--full", action="store_true", help="as many requests as published figures need")
    parser.add_argument("--engine-only", action="store_true", help="only what runs without Ray and HTTP")
    run = parser.add_argument_group("run")
    run.add_argument("--mix", choices=tuple(MIXES), default="demo-wide")
    run.add_argument("--against", default=None, help=f"sides, the reference first: {','.join(SIDES)}")
    run.add_argument("--url", help="a running server, as a further side or alone")
    run.add_argument("--dialect", choices=DIALECT_NAMES, default="sa3", help="how that server is asked")
    run.add_argument("--url-model", help="the model that server is asked for; default: its own choice")
    run.add_argument("--url-key", help="sent to it as a bearer token")
    run.add_argument("--count", type=int, help="requests of each list")
    run.add_argument(
        "--goodput-trials", type=int, help="steps of the search for the highest good rate; 0 leaves it out"
    )
    run.add_argument(
        "--attempts", type=int, default=4, help="at most, for a round beside which others used the machine"
    )
    run.add_argument("--budget-s", type=float, default=float("inf"), help="after this no new measurement begins")
    return parser


def _run_request(options: argparse.Namespace) -> RunRequest:
    against = options.against if options.against is not None else "" if options.url else "lock,static,ours"
    try:
        return RunRequest(
            options.mix,
            tuple(filter(None, against.split(","))),
            url=options.url,
            dialect=options.dialect,
            url_model=options.url_model,
            url_key=options.url_key,
            engine_only=options.engine_only,
            count=options.count,
            goodput_trials=options.goodput_trials,
            attempts=options.attempts,
            budget_s=options.budget_s,
        )
    except ValueError as error:
        raise SystemExit(str(error)) from error
