"""The goals of one H200 that the parts measure, in terms of their files. Only data."""

from __future__ import annotations

from benchmarks.goals import Goal
from benchmarks.gpu.published import CLIPS

_LONE, _PROFILE = "gpu-1-lone", "gpu-2-profile"
_FILES = {"equal-5s": "gpu-3-small", "small-8": "gpu-3-small", "small-mixed": "gpu-3-small"}
_MEDIUM_FILE = "gpu-4-medium"


def _mix(id: str, mix: str, *, figure: str, bound: float, over: str = "lock") -> Goal:
    path = ("mixes", mix, "ratios", "ours", over, figure)
    what = f"{mix} {figure}{'' if over == 'lock' else f' over {over}'}"
    return Goal(id, what, _FILES.get(mix, _MEDIUM_FILE), path, bound, figure in {"capacity", "goodput"})


_CAPACITY_OVER_LOCK = {"equal-5s": 4.0, "small-8": 2.0, "small-mixed": 1.4, "medium-8": 1.1, "sao-100": 1.0}
_CAPACITY_OVER_STATIC = {
    "small-8": 1.05, "small-mixed": 1.05, "medium-8": 1.1, "medium-mixed": 1.1, "equal-5s": 0.97, "sao-100": 0.95,
}  # fmt: skip
_CAPACITY_OVER_EAGER = {"small-8": 5.0, "medium-8": 1.4}
_P95 = {"small-8": 0.6, "small-mixed": 0.5, "medium-8": 0.75, "medium-mixed": 0.45, "sao-100": 1.05}
_P95_8 = {"small-mixed": 0.12, "medium-mixed": 0.1}
_P95_100 = {"small-mixed": 1.5, "medium-mixed": 1.5}
_GOODPUT_OVER_LOCK = {"small-8": 2.0, "small-mixed": 1.6, "medium-mixed": 3.0, "medium-8": 1.15, "sao-100": 0.98}
_GOODPUT_OVER_STATIC = {"small-8": 1.1, "small-mixed": 1.5, "medium-mixed": 4.0, "medium-8": 1.25}

GPU_GOALS: tuple[Goal, ...] = (
    *(_mix("P1", mix, figure="capacity", bound=bound) for mix, bound in _CAPACITY_OVER_LOCK.items()),
    *(_mix("P2", mix, figure="capacity", bound=bound, over="static") for mix, bound in _CAPACITY_OVER_STATIC.items()),
    *(
        Goal(
            "P3",
            f"{mix} capacity over a lock that captures nothing",
            _FILES.get(mix, _MEDIUM_FILE),
            ("capacity_over_eager_lock_ratio", mix),
            bound,
            True,
        )
        for mix, bound in _CAPACITY_OVER_EAGER.items()
    ),
    *(_mix("P4", mix, figure="p95", bound=bound) for mix, bound in _P95.items()),
    *(_mix("P5", mix, figure="p95_8", bound=bound) for mix, bound in _P95_8.items()),
    *(_mix("P5", mix, figure="p95_100", bound=bound) for mix, bound in _P95_100.items()),
    *(_mix("P6", mix, figure="goodput", bound=bound) for mix, bound in _GOODPUT_OVER_LOCK.items()),
    *(_mix("P6", mix, figure="goodput", bound=bound, over="static") for mix, bound in _GOODPUT_OVER_STATIC.items()),
    Goal("P7", "lone engine over what is allowed over bare", _LONE, ("lone_engine_over_allowed_worst_ratio",), 1.0),
    *(
        Goal("P8", f"{row.name} over TensorRT", _LONE, ("lone_pipeline_over_tensorrt_ratio", row.name), 1.5)
        for row in CLIPS
        if row.tensorrt_ms is not None
    ),
    *(
        Goal("P9", f"{row.name} alone of ideal", _PROFILE, ("roofline_share_alone", row.name), row.alone_share, True)
        for row in CLIPS
        if row.alone_share is not None
    ),
    *(
        Goal("P9", f"{row.name} crowd of ideal", _PROFILE, ("roofline_share_crowd", row.name), row.crowd_share, True)
        for row in CLIPS
        if row.crowd_share is not None
    ),
    *(
        Goal("P10", f"{row.name} busy share", _PROFILE, ("gpu_busy_share", row.name), 0.95, True)
        for row in CLIPS
        if row.crowd_share is not None
    ),
    *(
        Goal("P10", f"{row.name} gap between steps (ms)", _PROFILE, ("host_gap_between_steps_ms", row.name), 0.3)
        for row in CLIPS
        if row.crowd_share is not None
    ),
    *(
        Goal("P11", f"{row.name} peak over allowed (GB)", _PROFILE, ("memory_peak_over_allowed_gb", row.name), 0.0)
        for row in CLIPS
        if row.peak_gb is not None
    ),
    Goal("P11", "full over predicted", _PROFILE, ("memory_full_over_predicted_ratio",), 1.1),
    Goal("P11", "memory growth over 1,000 requests", _PROFILE, ("memory_growth_share",), 0.01),
)
