"""A comparison as pictures and a Markdown table: latency by share of requests, latency by rate, time by stage."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.compare.figures import steady_latencies_ms
from benchmarks.compare.playing import Record, read_records
from benchmarks.metrics import percentile

_SIZE = (7.0, 4.0)  # inches
_SUMS = ("total", "stalled")  # parts of, or over, the other stages


def format_comparison(results: Mapping[str, Any]) -> str:
    """Returns a Markdown table, one row per side: p95 by steps, and every figure also over the reference's."""
    reference = results["reference"]
    steps = [name for name in next(iter(results["sides"].values()))["latency"] if name != "all"]
    is_refusing = any(side.get("refused") or any(side.get("refused_at_once", ())) for side in results["sides"].values())
    head = [
        "side",
        "capacity (1/s)",
        "p50 (ms)",
        "p95 (ms)",
        "p99 (ms)",
        *(f"p95, {n} steps (ms)" for n in steps),
        "goodput (1/s)",
        *(["refused at once, later"] if is_refusing else []),
    ]
    lines = [head, ["---"] * len(head)]
    for name, side in results["sides"].items():
        ratios = results["ratios"][name].get(reference, {})

        def over(key: str, ratios: Mapping[str, Any] = ratios) -> str:
            ratio = ratios.get(key)
            return f" ({ratio['value']:.2f}x, {ratio['low']:.2f}-{ratio['high']:.2f})" if ratio else ""

        latency = side["latency"]["all"]
        lines.append(
            [
                name,
                f"{median(side['capacity_rps']):.2f}{over('capacity')}",
                f"{latency['p50_ms']:.0f}{over('p50')}",
                f"{latency['p95_ms']:.0f}{over('p95')}",
                f"{latency['p99_ms']:.0f}",
                *(
                    f"{side['latency'][n]['p95_ms']:.0f}{over(f'p95_{n}')}" if n in side["latency"] else ""
                    for n in steps
                ),
                f"{side['goodput']['good_rps']:.2f}{over('goodput')}" if side["goodput"] else "",
                *([f"{sum(side['refused_at_once'])}, {side['refused']}"] if is_refusing else []),
            ]
        )
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    said = (
        f"Mix {results['mix']}, {results['num_requests']} requests in {results['rounds']} rounds; latencies at "
        f"{results['rate_hz']:.2f} requests a second, {results['load_share']:g} of the capacity of {reference}; in "
        f"brackets over {reference}, with the range of the rounds. No clip is longer than "
        f"{results['max_duration_s']:g} s.\n\n"
    )
    if results["is_void"]:
        said += "**Void**: in some round other programs used more than a tenth of a core each time it was played.\n\n"
    return said + text + "\n"


def write_plots(folder: Path, results: Mapping[str, Any]) -> None:
    """SVG files in the folder of a run's pieces, drawn from them."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    rounds = [json.loads(path.read_text())["records"] for path in sorted(folder.glob("replay-?.json"))]
    sides = results["sides"]

    def save(name: str, *, x: str, y: str) -> None:
        pyplot.xlabel(x)
        pyplot.ylabel(y)
        pyplot.legend()
        pyplot.tight_layout()
        pyplot.savefig(folder / f"{name}.svg")
        pyplot.close()

    pyplot.figure(figsize=_SIZE)
    for name in sides:
        latencies_ms = sorted(ms for one in rounds for ms in steady_latencies_ms(read_records(one[name])))
        pyplot.step(latencies_ms, [(i + 1) / len(latencies_ms) for i in range(len(latencies_ms))], label=name)
    pyplot.xscale("log")
    save("latency", x=f"latency at {results['rate_hz']:.2f} requests a second (ms)", y="share of requests")

    pyplot.figure(figsize=_SIZE)
    for name in sides:
        lists = [read_records(one[name]) for one in rounds]
        lists += [read_records(json.loads(path.read_text())) for path in folder.glob(f"goodput-{name}-?.json")]
        points = sorted((_rate_hz(one), percentile(steady_latencies_ms(one), 0.95)) for one in lists)
        pyplot.plot([rate for rate, _ in points], [ms for _, ms in points], marker="o", label=name)
    pyplot.yscale("log")
    save("throughput", x="requests a second", y="p95 latency (ms)")

    pyplot.figure(figsize=_SIZE)
    stages = dict.fromkeys(stage for side in sides.values() for stage in side["stages_ms"])
    bottom = [0.0] * len(sides)
    for stage in stages:
        if stage in _SUMS:
            continue
        heights = [side["stages_ms"].get(stage, 0.0) for side in sides.values()]
        pyplot.bar(list(sides), heights, bottom=bottom, label=stage)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    save("stages", x="", y="mean time (ms)")


def _rate_hz(records: Sequence[Record]) -> float:
    return len(records) / max(record.due_at for record in records)
