"""docs/scaling.md from the committed results: how many GPUs, cores and bits a second a number of requests a minute
needs, and what is full first. Says of each figure whether it is simulated or measured. `make docs` writes it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.report import format_cell

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "cpu-2-cores"
PAGE = ROOT / "docs" / "scaling.md"

PER_MINUTE = (10, 1_000, 100_000)
_GPU_SHARE = 0.7  # of its capacity that is planned with: the rest is for bursts and a lost replica
_CORE_SHARE = 0.6
_LINK_GBIT = 10.0
_BITS = 8 / 1e9
_ROLES = ("ingress", "proxy", "replicas", "ray")

_HEAD = """# Scaling on paper

Written by `make docs` from [benchmarks/results](../benchmarks/results), that is from `python -m benchmarks capacity`,
`ingress` and `jobs`. Do not edit.

**Simulated**: what a GPU does. The engine's own scheduler runs on a model of one H200 in half precision with packed,
captured calls, always with enough to do; a GPU is planned with {gpu_share:.0%} of that. No host time is in it.
**Measured**, on {machine}, one run, not alone on the machine: the processor time of
everything around a GPU, on replicas whose device is a clock; and the job database's answers. What was measured stands
below. Another machine has other figures: measure it with these commands before you buy.
"""
_ONE_OF_EACH = f"""Requests a minute at which one of each is full. GPU: simulated. A replica's own process
(Python, one core)
and an ingress replica with its share of the proxy (one core): from measured processor time. Link:
{_LINK_GBIT:g} Gbit/s of
16-bit stereo WAV files; between replica and ingress the same audio is twice as large.
"""


@dataclass(frozen=True, slots=True)
class Costs:
    """What was measured, for one ingress replica: milliseconds of processor time for an answer of `s` seconds of audio
    (`fixed + s * per_s`) by role, for a job, and of one database connection for a job; cores of Ray's own processes.
    """

    answer_ms: Mapping[str, tuple[float, float]]
    job_ms: Mapping[str, float]
    database_ms: float
    ray_cores: float
    ray_cores_per_replica: float

    def of_answer(self, role: str, *, audio_s: float) -> float:
        """Returns milliseconds of processor time."""
        fixed, per_s = self.answer_ms[role]
        return fixed + per_s * audio_s

    def around(self, *, audio_s: float) -> float:
        """Returns the milliseconds of ingress and proxy for an answer."""
        return self.of_answer("ingress", audio_s=audio_s) + self.of_answer("proxy", audio_s=audio_s)


def read_costs(ingress: Mapping[str, Any], jobs: Mapping[str, Any]) -> Costs:
    """Returns the costs that the results of the cases `ingress` and `jobs` hold."""
    one = ingress["ingresses"]["1"]
    short, long = one["answer of 1 s"]["cpu_ms"], one["answer of 10 s"]["cpu_ms"]
    few, many = sorted(ingress["idle_cores"], key=int)
    idle = {count: cores["ray"] for count, cores in ingress["idle_cores"].items()}
    database = jobs["databases"]["postgresql"]
    slope = max(0.0, (idle[many] - idle[few]) / (int(many) - int(few)))
    return Costs(
        answer_ms={role: _line(short.get(role, 0.0), long.get(role, 0.0)) for role in ("ingress", "proxy", "replicas")},
        job_ms=one["job"]["cpu_ms"],
        # Submission, lease, and an end that writes about as much as the submission.
        database_ms=2 * database["worst_submit_p50_ms"] + database["worst_lease_p95_ms"],
        ray_cores=max(0.0, idle[few] - slope * int(few)),
        ray_cores_per_replica=slope,
    )


def _line(at_1_s: float, at_10_s: float) -> tuple[float, float]:
    per_s = max(0.0, (at_10_s - at_1_s) / 9.0)
    return max(0.0, at_1_s - per_s), per_s


def num_gpus(per_minute: float, *, capacity_per_minute: float) -> int:
    """Returns how many GPUs such a load is planned with."""
    return max(1, math.ceil(per_minute / (_GPU_SHARE * capacity_per_minute)))


def render(results: Path = RESULTS) -> str:
    """Returns the page for the results in a folder."""
    reports = {name: json.loads((results / f"{name}.json").read_text()) for name in ("capacity", "ingress", "jobs")}
    models = reports["capacity"]["results"]["models"]
    costs = read_costs(reports["ingress"]["results"], reports["jobs"]["results"])
    about = reports["ingress"]["environment"]
    parts = [
        _HEAD.format(gpu_share=_GPU_SHARE, machine=f"{about['cpu_count']} cores of {about['cpu']}"),
        "## What one of each does\n",
        _ONE_OF_EACH,
        _table(_limits(models, costs=costs)),
        "## What a load needs\n",
        f"Cores are planned with {_CORE_SHARE:.0%} of their time.\n",
        _table([row for name, figures in models.items() for row in _needs(name, figures, costs=costs)]),
        _measured(costs, reports["ingress"]["results"]),
        _advice(models, costs),
    ]
    return "\n".join(parts)


def _limits(models: Mapping[str, Any], *, costs: Costs) -> list[dict[str, object]]:
    rows = []
    for name, figures in models.items():
        seconds = figures["mean_audio_s"]
        limits = {
            "GPU": figures["requests_per_minute"],
            "replica process": 60_000 / costs.of_answer("replicas", audio_s=seconds),
            "ingress replica": 60_000 / costs.around(audio_s=seconds),
            "link": 60 * _LINK_GBIT / (figures["wav_bytes"] * _BITS),
        }
        first = min(limits, key=limits.__getitem__)
        rows.append({"model": name, "asked for": figures["asked"], **_whole(limits), "full first": first})
    return rows


def _needs(name: str, figures: Mapping[str, Any], *, costs: Costs) -> list[dict[str, object]]:
    seconds, capacity = figures["mean_audio_s"], figures["requests_per_minute"]
    rows = []
    for per_minute in PER_MINUTE:
        per_s, gpus = per_minute / 60, num_gpus(per_minute, capacity_per_minute=capacity)
        host = per_s * costs.of_answer("replicas", audio_s=seconds) / 1000 / _CORE_SHARE
        rows.append(
            {
                "model": name,
                "requests a minute": f"{per_minute:,}",
                "GPUs": gpus,
                "replicas": max(gpus, math.ceil(host)),
                "ingress replicas": max(1, math.ceil(per_s * costs.around(audio_s=seconds) / 1000 / _CORE_SHARE)),
                "WAV Gbit/s": per_s * figures["wav_bytes"] * _BITS,
                "database connections, if all are jobs": max(
                    1, math.ceil(per_s * costs.database_ms / 1000 / _CORE_SHARE)
                ),
            }
        )
    return rows


def _measured(costs: Costs, ingress: Mapping[str, Any]) -> str:
    dearer = [
        f"{kind} {two['cpu_ms']['ingress']:.1f} ms instead of {one['cpu_ms']['ingress']:.1f}"
        for kind, one in ingress["ingresses"]["1"].items()
        for two in (ingress["ingresses"]["2"][kind],)
    ]
    rate_hz, thousandths = ingress["load"]["rate_hz"], 1000 * costs.ray_cores_per_replica
    rows: list[dict[str, object]] = []
    for count, kinds in ingress["ingresses"].items():
        for kind, figures in kinds.items():
            used = {f"{role} ms": figures["cpu_ms"].get(role, 0.0) for role in _ROLES}
            rows.append({"ingress replicas": count, "request": kind, **used, "added p50 ms": figures["added_p50_ms"]})
    return f"""## What was measured

{_table(rows)}
Milliseconds of processor time for each request, by what the processes are for, at {rate_hz:g} requests a second; what
they use anyway is part of it. An answer is a WAV file. A job of 1 s counts from its submission to its stored file, with
SQLite and a folder, and its runner is part of `ray`. With two ingress replicas each request costs the ingress more:
{"; ".join(dearer)}.
While nothing is asked, Ray's own processes use {costs.ray_cores:.2f} cores, and {thousandths:.1f}
thousandths of a core for each replica of a model. A job has a connection to PostgreSQL for about
{costs.database_ms:.0f} ms:
submission, lease and end.
"""


def _advice(models: Mapping[str, Any], costs: Costs) -> str:
    most_per_s = PER_MINUTE[-1] / 60
    gpus = {name: num_gpus(PER_MINUTE[-1], capacity_per_minute=f["requests_per_minute"]) for name, f in models.items()}
    most = max(gpus, key=gpus.__getitem__)
    connections = math.ceil(most_per_s * costs.database_ms / 1000)
    return f"""## What is full first, and what to change

- **10 a minute.** Nothing. One GPU and one ingress replica do; the reason for a second is that one may fail. All models
  but Stable Audio Open 1.0 are idle nearly all the time: let them go to zero, or share a card.
- **1,000 a minute.** The GPUs of Stable Audio Open 1.0, and just so medium's. Replicas follow the predicted work:
  `max_replicas` is the table's number, `min_replicas` what the quiet hours need. Two ingress replicas or more, not on
  the head's node. Jobs in PostgreSQL and a bucket.
- **100,000 a minute** ({most_per_s:,.0f} a second). Of the small models the ingress first, which is Python, then a
  replica's own process before its GPU: ingress replicas on nodes of their own behind a load balancer, several replicas
  on a card with a share of it each. Then the network: compressed files, or jobs whose clients fetch files from
  the bucket, instead of
  WAV in the answer. Of the large models the GPUs: {most} needs {gpus[most]:,}.
- **The head and the controller.** A cluster has one of each. They carry no requests, but hear of every replica each
  second: if what Ray's processes use for a replica were all the controller's, its one thread would be full at about
  {_controller_limit(costs)} replicas. Before that, and wherever one failure must not reach everybody: several clusters
  behind one load balancer that share the job database and the bucket.
- **The database.** Jobs use it, and requests of keys with limits ([two transactions each](keys.md#limits), which are$
  not counted here). {most_per_s:,.0f} jobs a second keep about {connections} connections busy at the times
  measured with 100 a second; whether one PostgreSQL server keeps them was not measured. Interactive callers
  have the synchronous
  routes, and tenants can have servers with a database each.

Not measured: more than two ingress replicas, more than one machine, a real network, a GPU.
"""


def _controller_limit(costs: Costs) -> str:
    if costs.ray_cores_per_replica <= 0:
        return "more than a thousand"
    return f"{round(1 / costs.ray_cores_per_replica, -1):,.0f}"


def _whole(values: Mapping[str, float]) -> dict[str, object]:
    return {name: f"{value:,.0f}" for name, value in values.items()}


def _table(rows: Sequence[Mapping[str, object]]) -> str:
    lines: list[list[object]] = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join("| " + " | ".join(format_cell(cell) for cell in line) + " |" for line in lines) + "\n"


def main() -> None:
    """Write the page."""
    PAGE.write_text(render())


if __name__ == "__main__":
    main()
