"""The performance goals for one H200 GPU. The parts of the GPU benchmarks measure them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from benchmarks.goals import Goal
from benchmarks.gpu.published import CLIPS

_LONE, _BUSY, _SMALL, _MEDIUM = "gpu-1-lone", "gpu-2-busy", "gpu-3-small", "gpu-4-medium"
_OF_SMALL = ("equal-5s", "small-8", "small-mixed")

# (goal, figure, side with which `ours` is compared) -> the bound for each mix of requests.
_MIXES: Mapping[tuple[str, str, str], Mapping[str, float]] = {
    ("P1", "capacity", "lock"): {
        "equal-5s": 4.0, "small-8": 2.0, "small-mixed": 1.4, "medium-8": 1.1, "sao-100": 1.0,
    },
    ("P2", "capacity", "static"): {
        "small-8": 1.05, "small-mixed": 1.05, "medium-8": 1.1, "medium-mixed": 1.1, "equal-5s": 0.97, "sao-100": 0.95,
    },
    ("P4", "p95", "lock"): {
        "small-8": 0.6, "small-mixed": 0.5, "medium-8": 0.75, "medium-mixed": 0.45, "sao-100": 1.05,
    },
    ("P5", "p95_8", "lock"): {"small-mixed": 0.12, "medium-mixed": 0.1},
    ("P5", "p95_100", "lock"): {"small-mixed": 1.5, "medium-mixed": 1.5},
    ("P6", "goodput", "lock"): {
        "small-8": 2.0, "small-mixed": 1.6, "medium-mixed": 3.0, "medium-8": 1.15, "sao-100": 0.98,
    },
    ("P6", "goodput", "static"): {"small-8": 1.1, "small-mixed": 1.5, "medium-mixed": 4.0, "medium-8": 1.25},
}  # fmt: skip
_OVER_EAGER = {"small-8": 5.0, "medium-8": 1.4}


def _of_mixes() -> Iterator[Goal]:
    file = {mix: _SMALL if mix in _OF_SMALL else _MEDIUM for bounds in _MIXES.values() for mix in bounds}
    for (id, figure, over), bounds in _MIXES.items():
        for mix, bound in bounds.items():
            path = ("mixes", mix, "ratios", "ours", over, figure)
            yield Goal(id, f"{mix} {figure} over {over}", file[mix], path, bound, figure in {"capacity", "goodput"})
    for mix, bound in _OVER_EAGER.items():
        what = f"{mix} capacity over a lock without CUDA graphs"
        yield Goal("P3", what, file[mix], ("capacity_over_eager_lock_ratio", mix), bound, True)


def _of_clips() -> Iterator[Goal]:
    for row in CLIPS:
        for id, what, file, figure, bound, larger_is_better in (
            ("P8", "over TensorRT", _LONE, "lone_pipeline_over_tensorrt_ratio", row.tensorrt_ms and 1.5, False),
            ("P9", "alone, share of ideal speed", _LONE, "roofline_share_alone", row.alone_share, True),
            ("P9", "together, share of ideal speed", _BUSY, "roofline_share_crowd", row.crowd_share, True),
            ("P10", "busy share", _BUSY, "gpu_busy_share", row.crowd_share and 0.95, True),
            ("P10", "idle time per step (ms)", _BUSY, "idle_ms_per_step", row.crowd_share and 0.3, False),
            ("P11", "peak above allowed (GB)", _LONE, "memory_peak_over_allowed_gb", row.peak_gb and 0.0, False),
        ):
            if bound is not None:
                yield Goal(id, f"{row.name} {what}", file, (figure, row.name), bound, larger_is_better)


GPU_GOALS: tuple[Goal, ...] = (
    *_of_mixes(),
    Goal("P7", "time of a single clip over the allowed time", _LONE, ("lone_engine_over_allowed_worst_ratio",), 1.0),
    *_of_clips(),
    Goal("P11", "memory of a full engine over predicted", _BUSY, ("memory_full_over_predicted_ratio",), 1.1),
    Goal("P11", "memory growth over 1,000 requests", _BUSY, ("memory_growth_share",), 0.01),
)
