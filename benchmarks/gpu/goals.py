"""Stability AI's published figures for one H200, and our goals.

The work of each clip is computed from the shapes of the networks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.goals import Goal

_FILE = "gpu-first"
FLOPS = 790e12  # operations per second, sustained, in half precision


@dataclass(frozen=True, slots=True)
class ClipRow:
    """One clip of one model: its work, the published TensorRT time and peak memory, and our goals.

    The ideal time is the longer one of two times: the time for the operations at `FLOPS`, and the time to read and
    write weights and activations at 4.3 TB/s. `alone_share` and `crowd_share` are our goals for one clip and for eight
    clips at once, as shares of the ideal speed.
    """

    model: str  # small or medium
    duration_s: float
    clip_tflop: float
    ideal_ms: float
    tensorrt_ms: float
    peak_gb: float
    alone_share: float | None = None
    crowd_share: float | None = None

    @property
    def name(self) -> str:
        return f"{self.model} {self.duration_s:g} s"


CLIPS = (
    ClipRow("small", 5, 1.09, 2.2, tensorrt_ms=17, peak_gb=1.7),
    ClipRow("small", 30, 3.48, 4.4, tensorrt_ms=22, peak_gb=1.9, crowd_share=0.35),
    ClipRow("small", 120, 12.8, 16.2, tensorrt_ms=44, peak_gb=2.4, alone_share=0.28),
    ClipRow("medium", 5, 3.95, 7.1, tensorrt_ms=20, peak_gb=5.1),
    ClipRow("medium", 30, 13.8, 17.5, tensorrt_ms=50, peak_gb=5.5, alone_share=0.25, crowd_share=0.42),
    ClipRow("medium", 120, 52.0, 65.8, tensorrt_ms=130, peak_gb=6.5, alone_share=0.38),
)


def _of_clips() -> Iterator[Goal]:
    for row in CLIPS:
        for id, what, figure, bound, larger_is_better in (
            ("P8", "over TensorRT", "over_tensorrt_ratio", 1.5, False),
            ("P9", "alone, share of ideal speed", "roofline_share_alone", row.alone_share, True),
            ("P9", "together, share of ideal speed", "roofline_share_crowd", row.crowd_share, True),
            ("P11", "peak above allowed (GB)", "peak_over_allowed_gb", 0.0, False),
        ):
            if bound is not None:
                path = (f"times-{row.model}", "clips", row.name, figure)
                yield Goal(id, f"{row.name} {what}", _FILE, path, bound, larger_is_better)


GPU_GOALS: tuple[Goal, ...] = (
    *_of_clips(),
    Goal("P10", "small-mixed busy share", _FILE, ("load-small", "trace", "busy_share"), 0.95, True),
    Goal("P10", "medium-mixed busy share", _FILE, ("load-medium", "trace", "busy_share"), 0.95, True),
    Goal("P10", "small-mixed wait for the host between steps (ms)", _FILE, ("load-small", "trace", "host_gap_ms"), 0.3),
    Goal("P11", "memory growth from 50 to 500 requests", _FILE, ("leak", "growth_share", "held"), 0.01),
)
