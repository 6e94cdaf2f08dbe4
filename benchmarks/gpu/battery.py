"""Runs the requests of the engine's start-up check in engines with one fast feature each, and compares the audio with a
plain engine's.

The plain engine has no fast features: it runs in strict mode, without CUDA graphs, with padded rows, on one queue, with
blocking copies and float32 decoding. Also starts engines that check their features themselves.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from benchmarks.gpu.engines import ALL, EXACT, PLAIN, Machine
from benchmarks.gpu.results import Results
from benchmarks.load import Audio
from stable_audio_serve.core.errors import ConfigError
from stable_audio_serve.core.generation import Mode
from stable_audio_serve.engine.profile import battery
from stable_audio_serve.models.protocol import DiffusionModel

_LEAST_DB = 30.0  # as the engine's own check: in float16, two correct computations differ by the rounding


@dataclass(frozen=True, slots=True)
class Case:
    """An engine to compare with the plain engine: its features, and the precisions with which its model is loaded.

    `least_db` is the lowest allowed ratio of signal to error in decibels. None means that the bytes must be equal.
    """

    name: str
    features: frozenset[str] = PLAIN
    mode: Mode = "strict"
    least_db: float | None = None
    precision: Mapping[str, Any] = field(default_factory=dict)


# The cases with CUDA graphs come last, because a failed capture may break everything that the process does afterwards.
CASES = (
    Case("plain"),
    Case("async_copies", frozenset({"async_copies"})),
    Case("second_queue", frozenset({"second_queue"})),
    Case("shared_calls", mode="fast", least_db=_LEAST_DB),
    Case("packed_rows", frozenset({"packed_rows"}), mode="fast", least_db=_LEAST_DB),
    Case("fused_kernels", frozenset({"fused_kernels"}), least_db=_LEAST_DB),
    Case("tf32_decode", least_db=50.0, precision={"decode": "tf32"}),
    Case("half_decode", least_db=40.0, precision={"decode": "half"}),
    Case("float32_steps", least_db=-900.0, precision={"dtype": torch.float32}),  # any finite audio: has no bound
    Case("captures", frozenset({"captures"})),
    Case("all_exact", EXACT),
    Case("accelerated", ALL, mode="fast", least_db=_LEAST_DB, precision={"decode": None}),
)
_TINY_HALF_DB = 22.0  # bfloat16 on a CPU has three bits less than float16


async def measure(machine: Machine, results: Results, *, name: str) -> None:
    """Store how close the clips of each case are to the plain engine's clips. An error also counts as a difference."""
    model: DiffusionModel | None = None
    loaded: Mapping[str, Any] = {}
    plain: Sequence[Audio] = ()
    for case in CASES:
        try:
            if model is None or case.precision != loaded:
                model, loaded = None, case.precision
                machine.free()
                model = machine.load(name, **case.precision)
            plays = await _play(machine, results, case, model)
        except ConfigError as error:
            results.record(f"features.{case.name}.absent", str(error))
            continue
        except Exception as error:  # noqa: BLE001 - the other features are worth knowing
            results.record(f"features.{case.name}.error", traceback.format_exc()[-2000:])
            results.differ(f"{case.name}: {type(error).__name__}: {error}"[:300])
            continue
        plain = plain or plays[0]
        bound_db = _TINY_HALF_DB if machine.is_tiny and case.name == "half_decode" else case.least_db
        results.compare(case.name, plays, plain=plain, least_db=bound_db)


async def measure_start(machine: Machine, results: Results) -> None:
    """Store how long an engine with the options of a server takes to start, which profile it uses, and its memory plan.

    On CUDA, a profile other than `accelerated` counts as a difference.
    """
    for name in ("small", "medium"):
        model = machine.load(name, decode=None)
        started_at = time.perf_counter()
        async with machine.served(model) as engine:
            taken_s = time.perf_counter() - started_at
            figures = {"s": taken_s, "profile": engine.describe_profile(), "memory": asdict(engine.memory)}
            results.record(f"start.{name}", figures)
            if engine.profile.name != "accelerated" and not machine.is_tiny:
                results.differ(f"{name}: {engine.describe_profile()}")
            await engine.together(*battery(model.spec, longest_s=machine.sizes.longest_s))
        del engine, model


async def _play(  # noqa: PLR0917
    machine: Machine, results: Results, case: Case, model: DiffusionModel
) -> list[list[Audio]]:
    """Send the requests together four times: in their order and in reverse order, and then both once more.

    Between the second and the third time, the engine captures frequent calls as CUDA graphs. Returns the clips of each
    time, in the order of the requests.
    """
    requests = battery(model.spec, longest_s=machine.sizes.longest_s)
    async with machine.engine(model, case.features, mode=case.mode) as engine:
        plays = [(await engine.together(*requests[::step]))[::step] for step in (1, -1)]
        await engine.settle()
        misses = engine.captures.num_misses
        plays += [(await engine.together(*requests[::step]))[::step] for step in (1, -1)]
    figures = {"captured": engine.captures.num_captured, "misses": engine.captures.num_misses - misses}
    figures |= {"can_pack_segments": model.spec.packs_segments, "has_fused_kernels": model.spec.has_fused_kernels}
    results.record(f"features.{case.name}", figures)
    if engine.captures.num_off:
        results.differ(f"{case.name}: a captured call failed or differed, so the engine switched captures off")
    elif engine.can_capture and not engine.captures.num_captured:
        results.differ(f"{case.name}: nothing was captured")
    return plays
